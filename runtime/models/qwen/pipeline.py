"""Qwen-Image and Qwen-Image-Edit as a Pipeline: what diffusers' QwenImagePipeline, QwenImageEditPipeline and
QwenImageEditPlusPipeline compute, one step of several jobs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safelight.configs.families import ModelSpec
from safelight.configs.families.qwen_costs import MAX_EDIT_TEXT, MAX_TEXT
from safelight.configs.families.qwen_pictures import EDIT_RULES, EditRule
from safelight.runtime.errors import JobFailed
from safelight.runtime.inputs import InputStore
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.encoders.qwen2_5_vl import Qwen25VL, SeenPictures, load_qwen2_5_vl
from safelight.runtime.models.native import NativePipeline, Part, loaded_alike
from safelight.runtime.models.qwen.pictures import kept_pixels, seen_pictures
from safelight.runtime.models.qwen.transformer import QwenInputs, QwenTransformer
from safelight.runtime.models.qwen.weights import load_transformer
from safelight.runtime.models.vae.qwen import load_qwen_vae
from safelight.runtime.models.vae.tiles import WAN_BAND_ROWS
from safelight.runtime.models.vae.wan import WanVae
from safelight.runtime.pipelines.ahead import Ahead
from safelight.runtime.pipelines.conditioning import Branches, branch_names, ids_of
from safelight.runtime.pipelines.protocol import DenoiseState
from safelight.runtime.samplers import Schedule, read_image_config
from safelight.runtime.text.qwen import TEMPLATES

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions


@dataclass(frozen=True, slots=True)
class QwenConditioning(Branches):
    """Text embeddings (T, text_dim) in the transformer's dtype, of as many tokens as the prompt has: nothing is padded.

    references: latents (C, 1, h_i, w_i) float32 of the pictures.
    """

    references: tuple[Tensor, ...] = ()

    def shapes(self, index: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tensor.shape) for tensor in (self.branch(index), *self.references))


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenPipeline(NativePipeline[QwenTransformer, WanVae]):
    """`rule`: how pictures to edit are seen, None for a model that takes none; `pictures`: where they are kept."""

    text_encoder: Qwen25VL
    rule: EditRule | None = None
    pictures: InputStore | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.transformer, self.text_encoder.module, self.vae.module

    def encode(self, request: GenerationRequest) -> QwenConditioning:
        """The request's token ids and pictures -> embeddings and latents. The unconditional ones only when guided.

        Raises InvalidRequest when ids are missing or more than fit, JobFailed for a picture that is gone.
        """
        drop, limit = TEMPLATES[self.spec.images[1]].drop, MAX_TEXT if self.rule is None else MAX_EDIT_TEXT
        names = branch_names(guided=self.scale(request) > 1.0)
        ids = [ids_of(request, name, drop + limit, drop + 1) for name in names]
        seen, kept = self._pictures(request)
        with self.residency.on_device("text_encoder"):
            rows = self.text_encoder.encode(ids, drop, seen)
        positive, *negative = [row.to(self.transformer.dtype) for row in rows]
        references: tuple[Tensor, ...] = ()
        if kept:
            with self.residency.on_device("vae"):
                references = tuple(self.vae.encode(pixels) for pixels in kept)
        return QwenConditioning(positive, negative[0] if negative else None, references)

    def _pictures(self, request: GenerationRequest) -> tuple[SeenPictures | None, list[Tensor]]:
        """The request's pictures as the text encoder and as the VAE take them."""
        if not request.images:
            return None, []
        assert self.rule is not None, "the model takes pictures"
        if self.pictures is None:
            raise JobFailed("this worker was started without a folder of input pictures")
        pictures = [self.pictures.read(image) for image in request.images]
        seen = seen_pictures(pictures, self.rule, self.spec.processor)
        return seen, [kept_pixels(picture, self.rule) for picture in pictures]

    def inputs(self, parts: Sequence[Part]) -> QwenInputs:
        text = torch.stack([state.conditioning.branch(branch) for branch, state in parts])
        same = zip(*(state.conditioning.references for _, state in parts), strict=True)
        references = tuple(torch.stack(pictures).to(self.transformer.dtype) for pictures in same)
        return QwenInputs(text, references, torch.stack([self._modulation(state) for _, state in parts]))

    def _modulation(self, state: DenoiseState) -> Tensor:
        """(N, M, E) of a state's step: the same for all jobs of its schedule, and for both branches."""
        made = self.ahead.row((), self.schedule(state.request).timesteps, state.step, self._modulate)
        if self.transformer.times_of(state.conditioning.references) == 1:
            return made
        return torch.cat([made, self.ahead.row((), (0.0,), 0, self._modulate)])

    def _modulate(self, times: Sequence[float]) -> Tensor:
        return self.transformer.modulate(self.timesteps(times).to(self.device, non_blocking=True)[:, None])

    def schedule(self, request: GenerationRequest) -> Schedule:
        """The shift grows with the result's tokens; pictures to edit do not count."""
        return self.sampler(request).schedule(request.num_inference_steps, self.profile(request).tokens)

    def scale(self, request: GenerationRequest) -> float:
        assert request.true_cfg_scale is not None, "the family's defaults are complete"
        return request.true_cfg_scale

    def guide(self, cond: Tensor, uncond: Tensor, state: DenoiseState) -> Tensor:
        """Classifier-free guidance at the conditional prediction's length, token by token: (C, 1, h, w) each."""
        combined, patch = uncond + state.guidance_scale * (cond - uncond), self.transformer.config.patch_size
        return combined * (_lengths(cond, patch) / _lengths(combined, patch))

    def predictions_counted(self, state: DenoiseState) -> int:
        return 1  # the branches' texts differ in length, so each has a forward of its own


def _lengths(prediction: Tensor, patch: int) -> Tensor:
    """(C, 1, h, w) -> (1, 1, h, w): the L2 norm of the token that each latent belongs to."""
    tokens = torch.unflatten(torch.unflatten(prediction, 3, (-1, patch)), 2, (-1, patch))
    norms: Tensor = torch.linalg.vector_norm(tokens, dim=(0, 3, 5), keepdim=True)
    return norms.expand(1, 1, -1, patch, -1, patch).flatten(4, 5).flatten(2, 3)


def load(spec: ModelSpec, options: LoadOptions) -> QwenPipeline:
    """Loads every component of `spec.root`. Raises ModelError naming what is missing, corrupt or unsupported."""
    edits = spec.images[1] > 0
    residency = options.residency
    transformer = load_transformer(spec.root / "transformer", options)
    return QwenPipeline(
        **loaded_alike(spec, options),
        flow=read_image_config(spec.sampler),
        transformer=transformer,
        ahead=Ahead(transformer.modulation.row_bytes(transformer.dtype)),
        text_encoder=residency.load(
            "text_encoder",
            lambda home: load_qwen2_5_vl(
                spec.root / "text_encoder", home, options.dit_dtype, options.mesh, vision=edits
            ),
        ),
        vae=residency.load(
            "vae",
            lambda home: load_qwen_vae(
                options.vae_path or spec.root / "vae",
                home,
                options.vae_dtype,
                encoder=edits,
                band_rows=WAN_BAND_ROWS if options.vae_tiling else None,
                group=options.mesh.world,
            ),
        ),
        rule=EDIT_RULES.get(spec.images[1]),
        pictures=None if options.input_dir is None else InputStore(options.input_dir),
    )
