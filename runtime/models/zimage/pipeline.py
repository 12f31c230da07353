"""Z-Image text-to-image as a Pipeline: what diffusers' ZImagePipeline computes, one step of several jobs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from safelight.configs.families import ModelSpec
from safelight.configs.families.zimage_costs import MOST_TEXT_TOKENS, PATCH
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.encoders.qwen3 import Qwen3, load_qwen3
from safelight.runtime.models.native import NativePipeline, Part, loaded_alike
from safelight.runtime.models.vae.kl import KlVae, load_kl_vae
from safelight.runtime.models.vae.tiles import KL_BAND_ROWS
from safelight.runtime.models.zimage.transformer import ZImageText, ZImageTransformer
from safelight.runtime.models.zimage.weights import load_transformer
from safelight.runtime.pipelines.conditioning import Branches, branch_names, ids_of
from safelight.runtime.pipelines.protocol import DenoiseState
from safelight.runtime.samplers import Schedule, read_image_config

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions


@dataclass(frozen=True, slots=True)
class ZImageConditioning(Branches):
    """Captions (T, E) as the transformer's own blocks made them, T a multiple of 32 with learned padding, which is
    content. The two may differ in length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZImagePipeline(NativePipeline[ZImageTransformer, KlVae]):
    """The network reads how far a picture is, 0 to 1, and predicts the opposite of a velocity."""

    text_encoder: Qwen3

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.transformer, self.text_encoder.module, self.vae.module

    def encode(self, request: GenerationRequest) -> ZImageConditioning:
        """The request's token ids -> captions. The unconditional one only when guidance_scale > 0.

        Raises InvalidRequest when ids are missing or more than fit.
        """
        names = branch_names(guided=request.guidance_scale > 0.0)
        ids = [ids_of(request, name, MOST_TEXT_TOKENS) for name in names]
        with self.residency.on_device("text_encoder"):
            rows = self.text_encoder.encode(ids)
        positive, *negative = [self.transformer.caption(row[None])[0] for row in rows]
        return ZImageConditioning(positive, negative[0] if negative else None)

    def inputs(self, parts: Sequence[Part]) -> ZImageText:
        return ZImageText(torch.stack([state.conditioning.branch(branch) for branch, state in parts]))

    def schedule(self, request: GenerationRequest) -> Schedule:
        height, width = self.profile(request).latent_shape[-2:]
        return self.sampler(request).schedule(request.num_inference_steps, height * width // (PATCH * PATCH))

    def timesteps(self, times: Sequence[float]) -> Tensor:
        return (1000 - torch.tensor(times, dtype=torch.float32)) / 1000

    def predict(self, parts: Sequence[Part]) -> list[Tensor]:
        return [-opposite for opposite in NativePipeline.predict(self, parts)]

    def is_guided(self, state: DenoiseState) -> bool:
        """Until the step's time is beyond `cfg_truncation`."""
        time = self.schedule(state.request).timesteps[state.step]
        after = state.request.cfg_truncation
        return after is None or after > 1 or float((1000 - np.float32(time)) / np.float32(1000)) <= after

    def guide(self, cond: Tensor, uncond: Tensor, state: DenoiseState) -> Tensor:
        """Both (C, 1, h, w) float32 -> the prediction that is followed: cond + scale * (cond - uncond), shortened to
        `cfg_normalization` lengths of cond where it is longer."""
        guided = cond + state.guidance_scale * (cond - uncond)
        longest = state.request.cfg_normalization
        if not longest:
            return guided
        limit: Tensor = torch.linalg.vector_norm(cond) * longest
        return guided * torch.clamp(limit / torch.linalg.vector_norm(guided), max=1.0)


def load(spec: ModelSpec, options: LoadOptions) -> ZImagePipeline:
    """Loads every component of `spec.root`. Raises ModelError naming what is missing, corrupt or unsupported."""
    residency = options.residency
    return ZImagePipeline(
        **loaded_alike(spec, options),
        flow=replace(read_image_config(spec.sampler), torch_table=True),
        transformer=load_transformer(spec.root / "transformer", options),
        text_encoder=residency.load(
            "text_encoder", lambda home: load_qwen3(spec.root / "text_encoder", home, options.dit_dtype, options.mesh)
        ),
        vae=residency.load(
            "vae",
            lambda home: load_kl_vae(
                options.vae_path or spec.root / "vae",
                home,
                options.vae_dtype,
                band_rows=KL_BAND_ROWS if options.vae_tiling else None,
                group=options.mesh.world,
            ),
        ),
    )
