"""FLUX.1-dev."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.configs.families.base import ModelSpec
from safelight.configs.families.flux import DEV
from safelight.kernels.dispatch import KernelSet
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.flux.pipeline import FluxConditioning, FluxPipeline, Prompt
from safelight.runtime.models.flux.transformer import FluxConfig, FluxText, FluxTransformer
from safelight.runtime.models.flux.weights import name_map, parameter_dtype
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState, SamplerState
from safelight.runtime.samplers import make_sampler, read_image_config

CHECKPOINT, SIZES = "flux1-dev", ("full", "tiny")
DEFAULTS = {"frames": 1, "height": 1024, "width": 1024}
TEXT, GUIDANCE = 512, 3.5


class Bench:
    """Transformers and inputs; a sample is (latents, timestep, words, gist)."""

    def __init__(self, root: Path, device: torch.device, frames: int, height: int, width: int) -> None:
        self.root, self.folder, self.device = root, root / "transformer", device
        self.config = FluxConfig.from_json(read_json(self.folder / "config.json"))
        self.shape = (self.config.in_channels // 4, frames, height // 8, width // 8)
        self.small = (self.config.in_channels // 4, frames, 48, 32)
        self.size = (height, width)
        self.tokens = self.shape[2] * self.shape[3] // 4
        self.generator = torch.Generator(device).manual_seed(0)

    def draw(self, timestep: float = 500.0, *, small: bool = False) -> tuple[Tensor, ...]:
        """Fresh inputs."""
        shape = self.small if small else self.shape
        sizes = (shape, (TEXT, self.config.joint_attention_dim), (self.config.pooled_projection_dim,))
        latents, words, gist = (torch.randn(1, *s, generator=self.generator, device=self.device) for s in sizes)
        return latents, torch.full((1,), timestep, device=self.device), words, gist

    def model(self, kernels: KernelSet, compiled: bool) -> FluxTransformer:
        """Ours with a given kernel set (the runtime's own choice is `load_transformer`)."""
        with torch.device("meta"):
            model = FluxTransformer(self.config, ParallelMesh.single(), kernels)
        files, names = checkpoint_files(self.folder), name_map(self.config)
        load_weights(model, files, names, self.device, lambda name: parameter_dtype(name, torch.bfloat16))
        if compiled:
            model.compile_blocks()
        return model.eval()

    def ours(self, kernels: KernelSet, compiled: bool) -> Callable[..., Tensor]:
        model, guidance = self.model(kernels, compiled), torch.full((1,), GUIDANCE, device=self.device)
        return lambda latents, timestep, words, gist: model(latents, timestep, FluxText(words, gist, guidance))

    def theirs(self, dtype: torch.dtype, compiled: bool) -> Callable[..., Tensor]:
        from diffusers import FluxPipeline as Reference
        from diffusers import FluxTransformer2DModel

        model: Any = FluxTransformer2DModel.from_pretrained(self.folder, torch_dtype=dtype).to(self.device).eval()
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

    def steps(self, kernels: KernelSet) -> tuple[Any, DenoiseState]:
        """Our pipeline and a state at the start of its steps."""
        configs: Any = dict(DEV.configs)
        configs["transformer"] = read_json(self.folder / "config.json")
        spec = ModelSpec("flux", DEV.name, self.root, DEV.task, DEV.defaults, **configs)
        model = self.model(kernels, False)
        flow = read_image_config(read_json(self.root / "scheduler" / "scheduler_config.json"))
        pipeline = FluxPipeline(spec, self.device, ParallelMesh.single(), flow, model, Any, Any, Any)  # type: ignore[arg-type]
        request = GenerationRequest(
            "", "", {}, *self.size, 1, 1, 50, GUIDANCE, 0, 1, "euler", MediaSpec(MediaFormat.PNG), (), 1.0
        )  # fmt: skip
        latents, _, words, gist = self.draw()
        conditioning = FluxConditioning((Prompt(words[0].to(model.dtype), gist[0].to(model.dtype)),))
        sigmas, noise = make_sampler("euler", flow).schedule(50, self.tokens).sigmas, torch.Generator().get_state()
        return pipeline, DenoiseState(latents[0], 0, sigmas, SamplerState(), noise, GUIDANCE, conditioning, request, 0)
