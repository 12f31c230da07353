"""Qwen-Image and Qwen-Image-Edit as a Pipeline: what diffusers' QwenImagePipeline, QwenImageEditPipeline and
QwenImageEditPlusPipeline compute, one step of several jobs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.configs.families import FAMILIES, ModelSpec
from safelight.configs.families.qwen_costs import MAX_EDIT_TEXT, MAX_TEXT
from safelight.configs.families.qwen_pictures import EDIT_RULES, EditRule
from safelight.configs.profile import JobProfile
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import JobFailed
from safelight.runtime.inputs import InputStore
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.encoders.qwen2_5_vl import Qwen25VL, SeenPictures, load_qwen2_5_vl
from safelight.runtime.models.qwen.pictures import kept_pixels, seen_pictures
from safelight.runtime.models.qwen.transformer import QwenInputs, QwenTransformer
from safelight.runtime.models.qwen.weights import load_transformer
from safelight.runtime.models.residency import Residency
from safelight.runtime.models.vae.qwen import load_qwen_vae
from safelight.runtime.models.vae.tiles import WAN_BAND_ROWS
from safelight.runtime.models.vae.wan import DecodeCursor, WanVae
from safelight.runtime.parallel.cfg import gather_branches, own_branches
from safelight.runtime.parallel.mesh import Axis, ParallelMesh
from safelight.runtime.pipelines.conditioning import Branches, branch_names, ids_of
from safelight.runtime.pipelines.denoise import advance, forward_bytes, fresh_state
from safelight.runtime.pipelines.forward_graphs import ForwardGraphs
from safelight.runtime.pipelines.grouping import run_in_groups
from safelight.runtime.pipelines.preview import LatentColours, load_colours
from safelight.runtime.pipelines.protocol import DenoiseState, FrameChunk
from safelight.runtime.pipelines.state_file import load_state, save_state
from safelight.runtime.samplers import FlowConfig, Schedule, make_sampler, read_image_config
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
        """Of all tensors that a branch's forward reads: samples of other shapes need a forward of their own."""
        return tuple(tuple(tensor.shape) for tensor in (self.branch(index), *self.references))


@dataclass(frozen=True, slots=True)
class QwenPipeline:
    """One loaded model. It holds no state of any job.

    `rule`: how pictures to edit are seen, None for a model that takes none; `inputs`: where they are kept.
    """

    spec: ModelSpec
    device: torch.device
    mesh: ParallelMesh
    flow: FlowConfig
    transformer: QwenTransformer
    text_encoder: Qwen25VL
    vae: WanVae
    rule: EditRule | None = None
    inputs: InputStore | None = None
    residency: Residency = field(default_factory=Residency)
    graphs: ForwardGraphs = field(default_factory=ForwardGraphs)
    colours: LatentColours | None = None

    @property
    def collective_decode(self) -> bool:
        """The ranks share every picture."""
        return self.vae.group is not None

    def weights_bytes(self) -> int:
        """Bytes of all resident weights, and room for those that move in."""
        return self.residency.weights_bytes(self.transformer, self.text_encoder.module, self.vae.module)

    def profile(self, request: GenerationRequest) -> JobProfile:
        """The profile that frontend and scheduler compute from the same request."""
        return FAMILIES[self.spec.family].profile(self.spec, SamplingParams.of(request))

    def encode(self, request: GenerationRequest) -> QwenConditioning:
        """The request's token ids and pictures -> embeddings and latents. The unconditional ones only when guided.

        Raises InvalidRequest when ids are missing or more than fit, JobFailed for a picture that is gone.
        """
        drop, limit = TEMPLATES[self.spec.images[1]].drop, MAX_TEXT if self.rule is None else MAX_EDIT_TEXT
        names = branch_names(guided=_scale(request) > 1.0)
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
        if self.inputs is None:
            raise JobFailed("this worker was started without a folder of input pictures")
        pictures = [self.inputs.read(image) for image in request.images]
        seen = seen_pictures(pictures, self.rule, self.spec.processor)
        return seen, [kept_pixels(picture, self.rule) for picture in pictures]

    def prepare(self, request: GenerationRequest, conditioning: QwenConditioning, index: int) -> DenoiseState:
        """Noise of output `index`: float32 from a CPU generator seeded with seed + index, whole, then moved."""
        shape = self.profile(request).latent_shape
        sigmas = self._schedule(request).sigmas
        return fresh_state(request, conditioning, index, shape, sigmas, _scale(request), self.device)

    def step(self, states: Sequence[DenoiseState]) -> list[DenoiseState]:
        """One step of states of one latent shape and guidance mode (what a batch key says), in one batched forward for
        each length of text. With guidance a rank of the cfg axis may take one branch. Nothing waits for the device."""
        return advance(states, self._velocities(states), lambda request: make_sampler(request.sampler, self.flow))

    def _velocities(self, states: Sequence[DenoiseState]) -> list[Tensor]:
        """The guided prediction of each state, (C, 1, h, w) float32."""
        guided = states[0].conditioning.negative is not None
        assert all((s.conditioning.negative is not None) == guided for s in states), "one guidance mode in a batch"
        branches = 1 + guided
        own = own_branches(self.mesh, branches)
        parts = [(branch, state) for branch in own for state in states]
        predicted = run_in_groups(parts, lambda part: part[1].conditioning.shapes(part[0]), self._predict)
        by_branch = torch.unflatten(torch.stack(predicted), 0, (len(own), len(states)))
        whole = gather_branches(by_branch, branches, group=self.mesh.group(Axis.CFG))
        if not guided:
            return list(whole[0])
        return [
            self.guide(cond, uncond, state.guidance_scale)
            for state, cond, uncond in zip(states, whole[0], whole[1], strict=True)
        ]

    def _predict(self, parts: list[tuple[int, DenoiseState]]) -> list[Tensor]:
        """One forward for branches of states whose conditioning has one shape: (C, 1, h, w) float32 of each."""
        states, dtype = [state for _, state in parts], self.transformer.dtype
        steps = [self._schedule(s.request).timesteps[s.step] for s in states]
        timestep = torch.tensor(steps, dtype=torch.float32).to(self.device, non_blocking=True)
        latents = torch.stack([s.latents for s in states]).to(dtype)
        text = torch.stack([state.conditioning.branch(branch) for branch, state in parts])
        pictures = zip(*(s.conditioning.references for s in states), strict=True)
        references = tuple(torch.stack(same).to(dtype) for same in pictures)
        inputs, needs = QwenInputs(text, references), partial(forward_bytes, self, states, 1)
        predicted = self.graphs(self.transformer, latents, timestep, inputs, needs=needs)
        return list(predicted.float())

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance at the conditional prediction's length, token by token: (C, 1, h, w) each."""
        combined, patch = uncond + scale * (cond - uncond), self.transformer.config.patch_size
        return combined * (_lengths(cond, patch) / _lengths(combined, patch))

    def decode(self, state: DenoiseState, cursor: DecodeCursor | None) -> tuple[FrameChunk, DecodeCursor | None]:
        """The picture, in one chunk."""
        with self.residency.on_device("vae") as visit:
            frames, following = self.vae.decode(state.latents, cursor)
            visit.more = following is not None
        return FrameChunk(frames), following

    def preview(self, state: DenoiseState) -> Tensor | None:
        """See `pipelines.preview`; None for a VAE whose factors are not known."""
        return self.colours.preview(state) if self.colours else None

    def save(self, state: DenoiseState) -> dict[str, Tensor]:
        """See `pipelines.state_file`."""
        return save_state(state)

    def load(
        self, request: GenerationRequest, conditioning: QwenConditioning, tensors: dict[str, Tensor]
    ) -> DenoiseState:
        """Inverse of `save`, on this pipeline's device. Raises JobFailed for a state of another request."""
        state = load_state(tensors, request, conditioning, self.profile(request).latent_shape, self.device)
        return replace(state, guidance_scale=_scale(request))

    def _schedule(self, request: GenerationRequest) -> Schedule:
        """The shift grows with the result's tokens; pictures to edit do not count."""
        return make_sampler(request.sampler, self.flow).schedule(
            request.num_inference_steps, self.profile(request).tokens
        )


def _lengths(prediction: Tensor, patch: int) -> Tensor:
    """(C, 1, h, w) -> (1, 1, h, w): the L2 norm of the token that each latent belongs to."""
    tokens = torch.unflatten(torch.unflatten(prediction, 3, (-1, patch)), 2, (-1, patch))
    norms: Tensor = torch.linalg.vector_norm(tokens, dim=(0, 3, 5), keepdim=True)
    return norms.expand(1, 1, -1, patch, -1, patch).flatten(4, 5).flatten(2, 3)


def _scale(request: GenerationRequest) -> float:
    assert request.true_cfg_scale is not None, "the family's defaults are complete"
    return request.true_cfg_scale


def load(spec: ModelSpec, options: LoadOptions) -> QwenPipeline:
    """Loads every component of `spec.root`. Raises ModelError naming what is missing, corrupt or unsupported."""
    edits = spec.images[1] > 0
    flow = read_image_config(spec.sampler)
    residency, vae = options.residency, options.vae_path or spec.root / "vae"
    return QwenPipeline(
        spec=spec,
        device=options.device,
        mesh=options.mesh,
        flow=flow,
        transformer=load_transformer(spec.root / "transformer", options),
        text_encoder=residency.load(
            "text_encoder",
            lambda home: load_qwen2_5_vl(spec.root / "text_encoder", home, options.dit_dtype, vision=edits),
        ),
        vae=residency.load(
            "vae",
            lambda home: load_qwen_vae(
                vae,
                home,
                options.vae_dtype,
                encoder=edits,
                band_rows=WAN_BAND_ROWS if options.vae_tiling else None,
                group=options.mesh.world,
            ),
        ),
        rule=EDIT_RULES.get(spec.images[1]),
        inputs=None if options.input_dir is None else InputStore(options.input_dir),
        residency=residency,
        graphs=options.graphs,
        colours=load_colours(vae, options.device),
    )
