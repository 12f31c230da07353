"""Models with random weights for `bench_parallel.py`, made on the device: nothing is read from a disk.

Weights depend on the seed and the kind of device only, so that every rank has the same. They are scaled so that
activations stay of order one.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from safelight.configs.families import FAMILIES
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.traffic import StepShape
from safelight.entrypoints.plan import find_model
from safelight.kernels.dispatch import KernelSet, reference_kernels
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.wan.pipeline import WanConditioning, WanPipeline
from safelight.runtime.models.wan.transformer import WanConfig, WanTransformer
from safelight.runtime.models.wan.weights import parameter_dtype
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState, SamplerState
from safelight.runtime.samplers import FlowConfig, make_sampler

MODELS = {"1.3B": "Wan2.1-T2V-1.3B", "14B": "Wan2.1-T2V-14B"}
SIZES = {"480p": (480, 832), "720p": (720, 1280), "tiny": (64, 96)}
FLOW = FlowConfig("unipc", shift=3.0)
TEXT_TOKENS = 512
Weights = dict[str, Tensor]


def wan_config(model: str, tiny: bool) -> WanConfig:
    """Of a published model; `tiny`: its number of heads, everything else small."""
    values = {"in_channels": 16, "out_channels": 16, "freq_dim": 256, **find_model(MODELS[model]).transformer}
    config = WanConfig.from_json(values)
    return replace(config, attention_head_dim=12, text_dim=32, ffn_dim=64, num_layers=3) if tiny else config


def step_numbers(model: str, size: str, frames: int, tiny: bool) -> tuple[StepShape, float]:
    """What the cost model needs of one guided step: its shape, and its TFLOP (of the published model)."""
    height, width = SIZES[size]
    spec, config = find_model(MODELS[model]), wan_config(model, tiny)
    params = SamplingParams(height=height, width=width, num_frames=frames).merged_over(spec.defaults)
    profile = FAMILIES[spec.family].profile(spec, params)
    shape = StepShape(profile.tokens, config.num_attention_heads, config.attention_head_dim, config.num_layers, 64)
    return shape, profile.phases[0].step_cost


def random_weights(config: WanConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weights:
    """Every parameter of a transformer: matrices by their fan-in, norms near one, biases small."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        empty = WanTransformer(config, ParallelMesh.single(), reference_kernels())
    made = {}
    for name, parameter in empty.named_parameters():
        kept = parameter_dtype(name, dtype)
        noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=kept)
        if "norm" in name and name.endswith("weight"):
            noise.mul_(0.1).add_(1)
        else:
            noise.mul_(_scale(name, parameter))
        made[name] = noise
    return made


def _scale(name: str, parameter: nn.Parameter) -> float:
    if name.endswith("modulation"):
        return 0.2
    return float(parameter.shape[-1] ** -0.5) if parameter.ndim == 2 else 0.05


def transformer(
    config: WanConfig, weights: Weights, mesh: ParallelMesh, kernels: KernelSet, device: torch.device
) -> WanTransformer:
    """The network over a mesh, on weights that may be shared with other meshes."""
    with torch.device("meta"):
        model = WanTransformer(config, mesh, kernels)
    model.load_state_dict(weights, assign=True)
    model.rotary.to(device)
    return model.eval()


class GuidedStep:
    """Our pipeline's first step of one guided job; every call does the same. `layers` None: all of them."""

    def __init__(self, model: WanTransformer, mesh: ParallelMesh, device: torch.device, size: str, frames: int) -> None:
        self.model, self.blocks = model, model.blocks
        unused: Any = None  # the parts of a pipeline that a step has no use for
        self.pipeline = WanPipeline(
            spec=unused, device=device, mesh=mesh, flow=FLOW, transformer=model, vae=unused, text_encoder=unused
        )
        self.state = _state(model, device, *SIZES[size], frames)

    def __call__(self, layers: int | None = None) -> Tensor:
        self.model.blocks = self.blocks[:layers]
        (advanced,) = self.pipeline.step([self.state])
        self.model.blocks = self.blocks
        return advanced.latents


def _state(model: WanTransformer, device: torch.device, height: int, width: int, frames: int) -> DenoiseState:
    generator = torch.Generator(device).manual_seed(1)
    shape = (model.config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    latents = torch.randn(shape, generator=generator, device=device)
    text = torch.randn(2, TEXT_TOKENS, model.config.text_dim, generator=generator, device=device).to(model.dtype)
    text[:, 100:] = 0
    request = GenerationRequest(
        "", "", {}, height, width, frames, 16, 50, 5.0, 0, 1, "unipc", MediaSpec(MediaFormat.NPY)
    )
    return DenoiseState(
        latents, 0, make_sampler("unipc", FLOW).schedule(50).sigmas, SamplerState(), torch.Generator().get_state(),
        5.0, WanConditioning(text[0], text[1]), request, 0,
    )  # fmt: skip


def diffusers_transformer(config: WanConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' network of the same size with the dtypes of `from_pretrained(torch_dtype=dtype)`."""
    from checkpoints.parts import randomize
    from checkpoints.wan import wan_transformer

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with torch.device("meta"):
        model = wan_transformer(
            config.num_attention_heads, config.attention_head_dim, config.text_dim, config.freq_dim, config.ffn_dim,
            config.num_layers,
        )  # fmt: skip
    for name, parameter in model.named_parameters():
        kept = any(part in name.split(".") for part in model._keep_in_fp32_modules)
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    rope = type(model.rope)(config.attention_head_dim, tuple(config.patch_size), config.rope_max_seq_len)
    model.to_empty(device=device)
    model.rope = rope.to(device)  # its tables are buffers, which are not filled below
    randomize(model, torch.Generator(device).manual_seed(0))
    return model.eval()


def wan_vae(device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[Any, Tensor, Tensor]:
    """diffusers' AutoencoderKLWan of the published size, and the mean and inverse deviation of latents for `WanVae`."""
    from checkpoints.parts import randomize
    from checkpoints.wan import wan_vae as build

    with torch.device("meta"):
        module = build(8, dim_mult=[1, 1, 1, 1], num_res_blocks=1) if tiny else build(96)
    module.encoder = module.quant_conv = None
    module.to(dtype).to_empty(device=device)
    randomize(module, torch.Generator(device).manual_seed(0))
    mean, std = (
        torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1, 1)
        for values in (module.config.latents_mean, module.config.latents_std)
    )
    return module.eval(), mean, 1 / std
