"""Wan 2.1 1.3B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from make_checkpoint import make
from torch import Tensor

from safelight.configs.families.base import ModelSpec
from safelight.configs.families.wan import WAN_1_3B
from safelight.kernels.dispatch import KernelSet
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json
from safelight.runtime.models.wan.pipeline import WanConditioning, WanPipeline
from safelight.runtime.models.wan.transformer import WanConfig, WanText, WanTransformer
from safelight.runtime.models.wan.weights import name_map, parameter_dtype
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState, SamplerState
from safelight.runtime.samplers import make_sampler, read_config

SIZES = ("1.3b", "tiny")
DEFAULTS = {"frames": 81, "height": 480, "width": 832}


class Bench:
    """Transformers and inputs; a sample is (latents, timestep, text)."""

    def __init__(self, root: Path, size: str, device: torch.device, frames: int, height: int, width: int) -> None:
        make("wan2.1-t2v", root, size, components=("transformer", "scheduler"), device=device)
        self.root, self.folder, self.device = root, root / "transformer", device
        self.config = WanConfig.from_json(read_json(self.folder / "config.json"))
        self.shape = (self.config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
        self.small = (self.config.in_channels, min(3, self.shape[1]), 30, 52)
        self.tokens = self.shape[1] * self.shape[2] * self.shape[3] // 4
        self.generator = torch.Generator(device).manual_seed(0)

    def draw(self, timestep: float = 500.0, *, small: bool = False) -> tuple[Tensor, ...]:
        """Fresh inputs."""
        shape = self.small if small else self.shape
        latents = torch.randn(1, *shape, generator=self.generator, device=self.device)
        text = torch.randn(1, 512, self.config.text_dim, generator=self.generator, device=self.device)
        text[:, 100:] = 0
        return latents, torch.full((1,), timestep, device=self.device), text

    def model(self, kernels: KernelSet, compiled: bool) -> WanTransformer:
        """Ours with a given kernel set (the runtime's own choice is `load_transformer`)."""
        with torch.device("meta"):
            model = WanTransformer(self.config, ParallelMesh.single(), kernels)
        files, names = checkpoint_files(self.folder), name_map(self.config)
        load_weights(model, files, names, self.device, lambda name: parameter_dtype(name, torch.bfloat16))
        if compiled:
            model.compile_blocks()
        return model.eval()

    def ours(self, kernels: KernelSet, compiled: bool) -> Callable[..., Tensor]:
        model = self.model(kernels, compiled)
        return lambda latents, timestep, text: model(latents, timestep, WanText(text))

    def theirs(self, dtype: torch.dtype, compiled: bool) -> Callable[..., Tensor]:
        from diffusers import WanTransformer3DModel

        model: Any = WanTransformer3DModel.from_pretrained(self.folder, torch_dtype=dtype).to(self.device).eval()
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)
        return lambda latents, timestep, text: model(latents.to(dtype), timestep, text.to(dtype), return_dict=False)[0]

    def steps(self, kernels: KernelSet) -> tuple[Any, DenoiseState]:
        """Our pipeline and a state at the start of guided steps."""
        model, flow = self.model(kernels, False), read_config(read_json(self.root / "scheduler/scheduler_config.json"))
        configs: Any = dict(WAN_1_3B.configs)
        spec = ModelSpec("wan", WAN_1_3B.name, self.root, WAN_1_3B.task, WAN_1_3B.defaults, **configs)
        mesh, nothing = ParallelMesh.single(), cast(Any, None)
        pipeline = WanPipeline(
            spec=spec, device=self.device, mesh=mesh, flow=flow, transformer=model, vae=nothing, text_encoder=nothing
        )
        request = GenerationRequest(
            "", "", {}, 480, 832, 81, 16, 50, 5.0, 0, 1, "unipc", MediaSpec(MediaFormat.MP4)
        )  # fmt: skip
        latents, _, text = self.draw()
        conditioning = WanConditioning(text[0].to(model.dtype), text[0].flip(0).to(model.dtype))
        sigmas, noise = make_sampler("unipc", flow).schedule(50).sigmas, torch.Generator().get_state()
        return pipeline, DenoiseState(latents[0], 0, sigmas, SamplerState(), noise, 5.0, conditioning, request, 0)
