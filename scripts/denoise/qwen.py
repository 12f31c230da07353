"""Qwen-Image; `--size edit`: with one picture of 1024x1024 to edit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints.parts import randomize
from checkpoints.qwen import CHECKPOINTS, flow_euler
from torch import Tensor, nn

from safelight.configs.families.base import ModelSpec
from safelight.configs.families.qwen import EDIT_2509, QWEN_IMAGE
from safelight.kernels.dispatch import KernelSet
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.qwen.pipeline import QwenConditioning, QwenPipeline
from safelight.runtime.models.qwen.transformer import QwenConfig, QwenInputs, QwenTransformer
from safelight.runtime.models.qwen.weights import name_map, parameter_dtype
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState, SamplerState
from safelight.runtime.samplers import make_sampler, read_image_config

SIZES = ("full", "edit", "tiny")
DEFAULTS = {"frames": 1, "height": 1024, "width": 1024}
TEXT, PICTURE_TEXT, SCALE = 64, 192, 4.0  # tokens of a prompt, and of a picture of 384x384 pixels in it


class Bench:
    """Transformers and inputs; a sample is (latents, timestep, text, picture), the last empty unless it edits.

    The weights are made on the device, in bfloat16, and shared by all transformers; what ours fuses is made once.
    """

    def __init__(self, root: Path, size: str, device: torch.device, frames: int, height: int, width: int) -> None:
        self.root, self.device, self.size = root, device, (height, width)
        self.mesh = ParallelMesh.single()  # of what is made from now on
        sizes = CHECKPOINTS["qwen-image"]
        self.build = sizes["tiny" if size == "tiny" else "full"]().components["transformer"].build
        self.base = self._reference(torch.bfloat16)
        randomize(self.base, torch.Generator(device).manual_seed(0))
        self.config = QwenConfig.from_json(dict(self.base.config))
        self.fused: dict[str, nn.Parameter] = {}
        self.pictures = 1 if size == "edit" else 0
        self.text = TEXT + self.pictures * PICTURE_TEXT
        self.shape = (self.config.out_channels, frames, height // 8, width // 8)
        self.small = (self.config.out_channels, frames, 48, 32)
        self.tokens = self.shape[2] * self.shape[3] // 4 + self.pictures * 4096
        self.generator = torch.Generator(device).manual_seed(1)

    def _reference(self, dtype: torch.dtype) -> Any:
        """diffusers' transformer, uninitialised but for its rotary positions, which no file has."""
        with torch.device("meta"):
            model = self.build()
        return _with_positions(model.to(dtype).to_empty(device=self.device))

    def draw(self, timestep: float = 500.0, *, small: bool = False) -> tuple[Tensor, ...]:
        """Fresh inputs."""
        shape, side = (self.small, 32) if small else (self.shape, 128)
        sizes = shape, (self.text, self.config.joint_attention_dim), (self.config.out_channels, 1, side, side)
        latents, text, picture = (torch.randn(1, *s, generator=self.generator, device=self.device) for s in sizes)
        return latents, torch.full((1,), timestep, device=self.device), text, picture[: self.pictures]

    def model(self, kernels: KernelSet, compiled: bool) -> QwenTransformer:
        """Ours with a given kernel set (the runtime's own choice is `load_transformer`)."""
        with torch.device("meta"):
            model = QwenTransformer(self.config, self.mesh, kernels)
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
        model = self.model(kernels, compiled)
        return lambda latents, timestep, text, picture: model(
            latents, timestep, QwenInputs(text, (picture,) if len(picture) else ())
        )

    def theirs(self, dtype: torch.dtype, compiled: bool) -> Callable[..., Tensor]:
        from diffusers import QwenImagePipeline as Reference

        model = self._reference(dtype) if dtype != torch.bfloat16 else self._reference_of(self.base)
        if dtype != torch.bfloat16:
            for ours, parameter in zip(model.parameters(), self.base.parameters(), strict=True):
                ours.copy_(parameter)
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)

        def forward(latents: Tensor, timestep: Tensor, text: Tensor, picture: Tensor) -> Tensor:
            every = [latents, *([picture] if len(picture) else [])]
            packed = [Reference._pack_latents(x, 1, x.shape[1], *x.shape[-2:]) for x in every]
            shapes = [[(1, x.shape[-2] // 2, x.shape[-1] // 2) for x in every]]
            tokens = torch.cat(packed, dim=1).to(dtype)
            made = model(
                tokens, text.to(dtype), timestep=timestep / 1000, img_shapes=shapes, return_dict=False
            )[0]  # fmt: skip
            rows, columns = latents.shape[-2:]
            return Reference._unpack_latents(made[:, : packed[0].shape[1]], 8 * rows, 8 * columns, 8)

        return forward

    def _reference_of(self, base: Any) -> Any:
        """Another module of the same tensors, to be compiled."""
        with torch.device("meta"):
            made = self.build()
        made.load_state_dict(base.state_dict(), assign=True)
        return _with_positions(made)

    def steps(self, kernels: KernelSet) -> tuple[Any, DenoiseState]:
        """Our pipeline and a state at the start of its guided steps."""
        variant = EDIT_2509 if self.pictures else QWEN_IMAGE
        configs: Any = dict(variant.configs) | {"transformer": dict(self.base.config)}
        configs["vae"] = dict(configs["vae"]) | {"z_dim": self.config.out_channels}
        spec = ModelSpec("qwen", variant.name, self.root, variant.task, variant.defaults, **configs)
        model = self.model(kernels, False)
        flow = read_image_config({**flow_euler().config, "_class_name": "FlowMatchEulerDiscreteScheduler"})
        nothing: Any = None
        pipeline = QwenPipeline(
            spec=spec,
            device=self.device,
            mesh=self.mesh,
            flow=flow,
            transformer=model,
            vae=nothing,
            text_encoder=nothing,
        )
        request = GenerationRequest(
            "", "", {}, *self.size, 1, 1, 50, 1.0, 0, 1, "euler", MediaSpec(MediaFormat.PNG), (), SCALE
        )  # fmt: skip
        latents, _, text, picture = self.draw()
        positive = text[0].to(model.dtype)
        conditioning = QwenConditioning(positive, positive.flip(0)[: -TEXT + 8], tuple(picture))
        tokens = self.shape[2] * self.shape[3] // 4
        sigmas, noise = make_sampler("euler", flow).schedule(50, tokens).sigmas, torch.Generator().get_state()
        return pipeline, DenoiseState(latents[0], 0, sigmas, SamplerState(), noise, SCALE, conditioning, request, 0)


def _with_positions(model: Any) -> Any:
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    model.pos_embed = QwenEmbedRope(10000, list(model.config.axes_dims_rope), scale_rope=True)
    return model.eval().requires_grad_(False)
