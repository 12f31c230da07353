"""FLUX.1-dev."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints.flux import full, scheduler, tiny
from checkpoints.parts import randomize
from torch import Tensor, nn

from safelight.configs.families.base import ModelSpec
from safelight.configs.families.flux import DEV
from safelight.kernels.dispatch import KernelSet
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.flux.pipeline import FluxConditioning, FluxPipeline, Prompt
from safelight.runtime.models.flux.transformer import FluxConfig, FluxText, FluxTransformer
from safelight.runtime.models.flux.weights import name_map, parameter_dtype
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState, SamplerState
from safelight.runtime.samplers import make_sampler, read_image_config

SIZES = ("full", "tiny")
DEFAULTS = {"frames": 1, "height": 1024, "width": 1024}
TEXT, GUIDANCE = 512, 3.5


class Bench:
    """Transformers and inputs; a sample is (latents, timestep, words, gist).

    The weights are made on the device, in bfloat16, and shared by all transformers; what ours fuses is made once.
    """

    def __init__(self, root: Path, size: str, device: torch.device, frames: int, height: int, width: int) -> None:
        self.root, self.device, self.size = root, device, (height, width)
        self.mesh = ParallelMesh.single()  # of what is made from now on
        self.build = {"full": full, "tiny": tiny}[size](True).components["transformer"].build
        self.base = self._reference(torch.bfloat16)
        randomize(self.base, torch.Generator(device).manual_seed(0))
        self.config = FluxConfig.from_json(dict(self.base.config))
        self.fused: dict[str, nn.Parameter] = {}
        self.shape = (self.config.in_channels // 4, frames, height // 8, width // 8)
        self.small = (self.config.in_channels // 4, frames, 48, 32)
        self.tokens = self.shape[2] * self.shape[3] // 4
        self.generator = torch.Generator(device).manual_seed(1)

    def _reference(self, dtype: torch.dtype) -> Any:
        """diffusers' transformer, uninitialised. Its rotary positions are computed in the call."""
        with torch.device("meta"):
            model = self.build()
        return model.to(dtype).to_empty(device=self.device).eval().requires_grad_(False)

    def draw(self, timestep: float = 500.0, *, small: bool = False) -> tuple[Tensor, ...]:
        """Fresh inputs."""
        shape = self.small if small else self.shape
        sizes = (shape, (TEXT, self.config.joint_attention_dim), (self.config.pooled_projection_dim,))
        latents, words, gist = (torch.randn(1, *s, generator=self.generator, device=self.device) for s in sizes)
        return latents, torch.full((1,), timestep, device=self.device), words, gist

    def model(self, kernels: KernelSet, compiled: bool) -> FluxTransformer:
        """Ours with a given kernel set (the runtime's own choice is `load_transformer`)."""
        with torch.device("meta"):
            model = FluxTransformer(self.config, self.mesh, kernels)
        stored = dict(self.base.named_parameters())
        for name, sources in name_map(self.config).items():
            owner, _, leaf = name.rpartition(".")
            if name not in self.fused:
                whole = stored[sources[0]].data if len(sources) == 1 else torch.cat([stored[s].data for s in sources])
                self.fused[name] = nn.Parameter(whole.to(parameter_dtype(name, torch.bfloat16)), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, self.fused[name])
        model.rotary.to(self.device)
        if compiled:
            model.compile_blocks()
        return model.eval()

    def ours(self, kernels: KernelSet, compiled: bool) -> Callable[..., Tensor]:
        model, guidance = self.model(kernels, compiled), torch.full((1,), GUIDANCE, device=self.device)
        return lambda latents, timestep, words, gist: model(latents, timestep, FluxText(words, gist, guidance))

    def theirs(self, dtype: torch.dtype, compiled: bool) -> Callable[..., Tensor]:
        from diffusers import FluxPipeline as Reference

        model = self._reference(dtype) if dtype != torch.bfloat16 else self._reference_of(self.base)
        if dtype != torch.bfloat16:
            for ours, parameter in zip(model.parameters(), self.base.parameters(), strict=True):
                ours.copy_(parameter)
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)
        guidance = torch.full((1,), GUIDANCE, device=self.device)
        texts = torch.zeros(TEXT, 3, device=self.device, dtype=dtype)

        def forward(latents: Tensor, timestep: Tensor, words: Tensor, gist: Tensor) -> Tensor:
            channels, rows, columns = latents.shape[1], *latents.shape[-2:]
            packed = Reference._pack_latents(latents[:, :, 0], 1, channels, rows, columns)
            places = Reference._prepare_latent_image_ids(1, rows // 2, columns // 2, self.device, dtype)
            made = model(
                packed.to(dtype), words.to(dtype), gist.to(dtype), timestep / 1000, places, texts, guidance,
                return_dict=False,
            )[0]  # fmt: skip
            return Reference._unpack_latents(made, 8 * rows, 8 * columns, 8)[:, :, None]

        return forward

    def _reference_of(self, base: Any) -> Any:
        """Another module of the same tensors, to be compiled."""
        with torch.device("meta"):
            made = self.build()
        made.load_state_dict(base.state_dict(), assign=True)
        return made.eval().requires_grad_(False)

    def steps(self, kernels: KernelSet) -> tuple[Any, DenoiseState]:
        """Our pipeline and a state at the start of its steps."""
        configs: Any = dict(DEV.configs) | {"transformer": dict(self.base.config)}
        spec = ModelSpec("flux", DEV.name, self.root, DEV.task, DEV.defaults, **configs)
        model = self.model(kernels, False)
        flow = read_image_config({**scheduler(True).config, "_class_name": "FlowMatchEulerDiscreteScheduler"})
        nothing: Any = None
        pipeline = FluxPipeline(
            spec=spec, device=self.device, mesh=self.mesh, flow=flow, transformer=model, vae=nothing, clip=nothing,
            t5=nothing,
        )  # fmt: skip
        request = GenerationRequest(
            "", "", {}, *self.size, 1, 1, 50, GUIDANCE, 0, 1, "euler", MediaSpec(MediaFormat.PNG), (), 1.0
        )  # fmt: skip
        latents, _, words, gist = self.draw()
        conditioning = FluxConditioning((Prompt(words[0].to(model.dtype), gist[0].to(model.dtype)),))
        sigmas, noise = make_sampler("euler", flow).schedule(50, self.tokens).sigmas, torch.Generator().get_state()
        return pipeline, DenoiseState(latents[0], 0, sigmas, SamplerState(), noise, GUIDANCE, conditioning, request, 0)
