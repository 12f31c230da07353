"""Z-Image-Turbo, with a caption of 100 tokens, whose own blocks are in every forward here and run once in a job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from make_checkpoint import make
from torch import Tensor

from safelight.configs.families.base import ModelSpec
from safelight.configs.families.zimage import TURBO
from safelight.kernels.dispatch import KernelSet
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json
from safelight.runtime.models.zimage.pipeline import ZImageConditioning, ZImagePipeline
from safelight.runtime.models.zimage.transformer import ZImageConfig, ZImageText, ZImageTransformer
from safelight.runtime.models.zimage.weights import name_map, parameter_dtype
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState, SamplerState
from safelight.runtime.samplers import make_sampler, read_image_config

SIZES = ("full", "tiny")
DEFAULTS = {"frames": 1, "height": 1024, "width": 1024}
CAPTION, STEPS = 100, 8


class Bench:
    """Transformers and inputs; a sample is (latents, timestep of 1000, hidden states)."""

    def __init__(self, root: Path, size: str, device: torch.device, frames: int, height: int, width: int) -> None:
        make("z-image-turbo", root, size, components=("transformer", "scheduler"), device=device)
        self.root, self.folder, self.device = root, root / "transformer", device
        self.config = ZImageConfig.from_json(read_json(self.folder / "config.json"))
        self.shape = (self.config.in_channels, frames, height // 8, width // 8)
        self.small = (self.config.in_channels, frames, 48, 32)
        self.size = (height, width)
        self.tokens = self.shape[2] * self.shape[3] // 4
        self.generator = torch.Generator(device).manual_seed(0)

    def draw(self, timestep: float = 500.0, *, small: bool = False) -> tuple[Tensor, ...]:
        """Fresh inputs."""
        shapes = (self.small if small else self.shape, (CAPTION, self.config.cap_feat_dim))
        latents, text = (torch.randn(1, *s, generator=self.generator, device=self.device) for s in shapes)
        return latents, torch.full((1,), timestep, device=self.device), text

    def model(self, kernels: KernelSet, compiled: bool) -> ZImageTransformer:
        """Ours with a given kernel set (the runtime's own choice is `load_transformer`)."""
        with torch.device("meta"):
            model = ZImageTransformer(self.config, ParallelMesh.single(), kernels)
        files, names = checkpoint_files(self.folder), name_map(self.config)
        load_weights(model, files, names, self.device, lambda name: parameter_dtype(name, torch.bfloat16))
        if compiled:
            model.compile_blocks()
        return model.eval()

    def ours(self, kernels: KernelSet, compiled: bool) -> Callable[..., Tensor]:
        model = self.model(kernels, compiled)
        return lambda latents, timestep, text: model(latents, 1 - timestep / 1000, ZImageText(model.caption(text)))

    def theirs(self, dtype: torch.dtype, compiled: bool) -> Callable[..., Tensor]:
        from diffusers import ZImageTransformer2DModel

        model: Any = ZImageTransformer2DModel.from_pretrained(self.folder, torch_dtype=dtype).to(self.device).eval()
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)

        def forward(latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            made = model(list(latents.to(dtype)), 1 - timestep / 1000, list(text.to(dtype)), return_dict=False)[0]
            return torch.stack(list(made))

        return forward

    def steps(self, kernels: KernelSet) -> tuple[Any, DenoiseState]:
        """Our pipeline and a state at the start of its steps, unguided."""
        configs: Any = dict(TURBO.configs)
        configs["transformer"] = read_json(self.folder / "config.json")
        spec = ModelSpec("zimage", TURBO.name, self.root, TURBO.task, TURBO.defaults, **configs)
        model = self.model(kernels, False)
        read = read_image_config(read_json(self.root / "scheduler" / "scheduler_config.json"))
        flow = replace(read, torch_table=True)
        mesh, nothing = ParallelMesh.single(), cast(Any, None)
        pipeline = ZImagePipeline(
            spec=spec, device=self.device, mesh=mesh, flow=flow, transformer=model, vae=nothing, text_encoder=nothing
        )
        request = GenerationRequest(
            "", "", {}, *self.size, 1, 1, STEPS, 0.0, 0, 1, "euler", MediaSpec(MediaFormat.PNG)
        )  # fmt: skip
        latents, _, text = self.draw()
        conditioning = ZImageConditioning(model.caption(text)[0], None)
        sigmas, noise = make_sampler("euler", flow).schedule(STEPS, self.tokens).sigmas, torch.Generator().get_state()
        return pipeline, DenoiseState(latents[0], 0, sigmas, SamplerState(), noise, 0.0, conditioning, request, 0)
