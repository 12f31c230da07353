"""FLUX.1 text-to-image as a Pipeline: what diffusers' FluxPipeline computes, one step of several jobs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safelight.configs.families import ModelSpec
from safelight.configs.families.flux_costs import CLIP_TOKENS, text_tokens
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.encoders.clip import ClipText, load_clip
from safelight.runtime.models.encoders.t5 import T5, load_t5
from safelight.runtime.models.flux.transformer import FluxText, FluxTransformer
from safelight.runtime.models.flux.weights import load_transformer
from safelight.runtime.models.native import NativePipeline, Part, loaded_alike
from safelight.runtime.models.vae.kl import KlVae, load_kl_vae
from safelight.runtime.models.vae.tiles import KL_BAND_ROWS
from safelight.runtime.pipelines.ahead import Ahead
from safelight.runtime.pipelines.conditioning import branch_names, ids_of
from safelight.runtime.pipelines.protocol import DenoiseState
from safelight.runtime.samplers import Schedule, read_image_config

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One prompt's embeddings: `words` (T, E of T5) and `gist` (E of CLIP,), in the transformer's dtype. Words are
    padded to T, and what T5 makes of the padding is content."""

    words: Tensor
    gist: Tensor


@dataclass(frozen=True, slots=True)
class FluxConditioning:
    """`branches`: the prompt, and for true classifier-free guidance the negative prompt."""

    branches: tuple[Prompt, ...]

    @property
    def count(self) -> int:
        return len(self.branches)

    def shapes(self, index: int) -> tuple[int, ...]:
        return tuple(self.branches[index].words.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxPipeline(NativePipeline[FluxTransformer, KlVae]):
    """`guidance_scale` is what the dev model embeds; `true_cfg_scale` above 1 makes two predictions."""

    clip: ClipText
    t5: T5

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.transformer, self.clip.module, self.t5.module, self.vae.module

    def encode(self, request: GenerationRequest) -> FluxConditioning:
        """The request's token ids -> embeddings; of the negative prompt only when true_cfg_scale > 1.

        Raises InvalidRequest when ids are missing or more than fit.
        """
        names = branch_names(guided=(request.true_cfg_scale or 0.0) > 1.0)
        length = text_tokens(self.spec)
        for_t5 = [ids_of(request, name, length) for name in names]
        for_clip = [ids_of(request, f"clip.{name}", CLIP_TOKENS) for name in names]
        with self.residency.on_device("text_encoder"):
            gists, words = self.clip.pooled(for_clip), self.t5.encode(for_t5, length)
        dtype = self.transformer.dtype
        pairs = zip(words, gists, strict=True)
        return FluxConditioning(tuple(Prompt(word.to(dtype), gist.to(dtype)) for word, gist in pairs))

    def inputs(self, parts: Sequence[Part]) -> FluxText:
        words = torch.stack([state.conditioning.branches[branch].words for branch, state in parts])
        return FluxText(words, modulation=torch.stack([self._modulation(*part) for part in parts]))

    def _modulation(self, branch: int, state: DenoiseState) -> Tensor:
        """(1, M, E) of a sample's step."""
        prompt: Prompt = state.conditioning.branches[branch]

        def make(times: Sequence[float]) -> Tensor:
            given = self.timesteps(times), torch.tensor([state.guidance_scale], dtype=torch.float32)
            timestep, scale = (tensor.to(self.device, non_blocking=True) for tensor in given)
            return self.transformer.modulate(timestep, prompt.gist[None], scale)

        times = self.schedule(state.request).timesteps
        return self.ahead.row((prompt, state.guidance_scale), times, state.step, make)

    def schedule(self, request: GenerationRequest) -> Schedule:
        return self.sampler(request).schedule(request.num_inference_steps, self.profile(request).tokens)

    def guide(self, cond: Tensor, uncond: Tensor, state: DenoiseState) -> Tensor:
        return uncond + (state.request.true_cfg_scale or 0.0) * (cond - uncond)


def load(spec: ModelSpec, options: LoadOptions) -> FluxPipeline:
    """Loads every component of `spec.root`. Raises ModelError naming what is missing, corrupt or unsupported."""
    residency = options.residency
    transformer = load_transformer(spec.root / "transformer", options)
    return FluxPipeline(
        **loaded_alike(spec, options),
        flow=read_image_config(spec.sampler),
        transformer=transformer,
        ahead=Ahead(transformer.modulation.row_bytes(transformer.dtype)),
        clip=residency.load(
            "text_encoder", lambda home: load_clip(spec.root / "text_encoder", home, options.dit_dtype)
        ),
        t5=residency.load(
            "text_encoder",
            lambda home: load_t5(spec.root / "text_encoder_2", home, options.dit_dtype, options.mesh),
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
