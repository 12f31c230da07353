"""Wan 2.1 text-to-video as a Pipeline: what diffusers' WanPipeline computes, one step of several jobs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from safelight.configs.families import ModelSpec
from safelight.configs.families.wan_costs import TEXT_TOKENS
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.encoders.umt5 import UMT5, load_umt5
from safelight.runtime.models.native import NativePipeline, Part, loaded_alike
from safelight.runtime.models.vae.tiles import WAN_BAND_ROWS
from safelight.runtime.models.vae.wan import WanVae, load_wan_vae
from safelight.runtime.models.wan.transformer import WanText, WanTransformer
from safelight.runtime.models.wan.weights import load_transformer
from safelight.runtime.pipelines.conditioning import Branches, branch_names, ids_of
from safelight.runtime.samplers import Schedule, read_config

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions


@dataclass(frozen=True, slots=True)
class WanConditioning(Branches):
    """Text embeddings (T, text_dim) in the transformer's dtype, zero-padded to T = 512: the zeros are content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WanPipeline(NativePipeline[WanTransformer, WanVae]):
    """A video is decoded by latent frame: 1 frame, then 4 at a time."""

    text_encoder: UMT5

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.transformer, self.text_encoder.module, self.vae.module

    def encode(self, request: GenerationRequest) -> WanConditioning:
        """The request's token ids -> embeddings. The unconditional ones only when guidance_scale > 1.

        Raises InvalidRequest when ids are missing or more than fit.
        """
        names = branch_names(guided=request.guidance_scale > 1.0)
        ids = [ids_of(request, name, TEXT_TOKENS) for name in names]
        with self.residency.on_device("text_encoder"):
            rows = self.text_encoder.encode(ids)
        padded = [torch.nn.functional.pad(row, (0, 0, 0, TEXT_TOKENS - len(row))) for row in rows]
        positive, *negative = [row.to(self.transformer.dtype) for row in padded]
        return WanConditioning(positive, negative[0] if negative else None)

    def inputs(self, parts: Sequence[Part]) -> WanText:
        return WanText(torch.stack([state.conditioning.branch(branch) for branch, state in parts]))

    def schedule(self, request: GenerationRequest) -> Schedule:
        return self.sampler(request).schedule(request.num_inference_steps)


def load(spec: ModelSpec, options: LoadOptions) -> WanPipeline:
    """Loads every component of `spec.root`. Raises ModelError naming what is missing, corrupt or unsupported."""
    residency = options.residency
    return WanPipeline(
        **loaded_alike(spec, options),
        flow=read_config(spec.sampler),
        transformer=load_transformer(spec.root / "transformer", options),
        text_encoder=residency.load(
            "text_encoder",
            lambda home: load_umt5(spec.root / "text_encoder", home, options.dit_dtype, options.mesh),
        ),
        vae=residency.load(
            "vae",
            lambda home: load_wan_vae(
                options.vae_path or spec.root / "vae",
                home,
                options.vae_dtype,
                band_rows=WAN_BAND_ROWS if options.vae_tiling else None,
                group=options.mesh.world,
            ),
        ),
    )
