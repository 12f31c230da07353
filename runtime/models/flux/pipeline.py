"""FLUX.1 text-to-image as a Pipeline: what diffusers' FluxPipeline computes, one step of several jobs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from safelight.configs.families import FAMILIES, ModelSpec
from safelight.configs.families.flux_costs import CLIP_TOKENS, text_tokens
from safelight.configs.profile import JobProfile
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.encoders.clip import ClipText, load_clip
from safelight.runtime.models.encoders.t5 import T5, load_t5
from safelight.runtime.models.flux.transformer import FluxText, FluxTransformer
from safelight.runtime.models.flux.weights import load_transformer
from safelight.runtime.models.residency import Residency
from safelight.runtime.models.vae.kl import KlVae, load_kl_vae
from safelight.runtime.models.vae.tiles import KL_BAND_ROWS
from safelight.runtime.parallel.cfg import gather_branches, own_branches
from safelight.runtime.parallel.mesh import Axis, ParallelMesh
from safelight.runtime.pipelines.conditioning import branch_names, ids_of
from safelight.runtime.pipelines.denoise import advance, forward_bytes, fresh_state
from safelight.runtime.pipelines.forward_graphs import ForwardGraphs
from safelight.runtime.pipelines.preview import LatentColours, load_colours
from safelight.runtime.pipelines.protocol import DenoiseState, FrameChunk
from safelight.runtime.pipelines.state_file import load_state, save_state
from safelight.runtime.samplers import FlowConfig, Sampler, Schedule, make_sampler, read_image_config

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt's embeddings: `words` (T, E of T5) and `gist` (E of CLIP,), in the transformer's dtype. Words are
    padded to T, and what T5 makes of the padding is content."""

    words: torch.Tensor
    gist: torch.Tensor


@dataclass(frozen=True, slots=True)
class FluxConditioning:
    """`branches`: the prompt, and for true classifier-free guidance the negative prompt."""

    branches: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class FluxPipeline:
    """One loaded model. It holds no state of any job."""

    spec: ModelSpec
    device: torch.device
    mesh: ParallelMesh
    flow: FlowConfig
    transformer: FluxTransformer
    clip: ClipText
    t5: T5
    vae: KlVae
    residency: Residency = field(default_factory=Residency)
    graphs: ForwardGraphs = field(default_factory=ForwardGraphs)
    colours: LatentColours | None = None

    @property
    def collective_decode(self) -> bool:
        """The ranks share the picture."""
        return self.vae.group is not None

    def weights_bytes(self) -> int:
        """Bytes of all resident weights, and room for those that move in."""
        return self.residency.weights_bytes(self.transformer, self.clip.module, self.t5.module, self.vae.module)

    def profile(self, request: GenerationRequest) -> JobProfile:
        """The profile that frontend and scheduler compute from the same request."""
        return FAMILIES[self.spec.family].profile(self.spec, SamplingParams.of(request))

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

    def prepare(self, request: GenerationRequest, conditioning: FluxConditioning, index: int) -> DenoiseState:
        """Noise of output `index`: float32 from a CPU generator seeded with seed + index, whole, then moved."""
        shape = self.profile(request).latent_shape
        sigmas = self._schedule(request).sigmas
        return fresh_state(request, conditioning, index, shape, sigmas, request.guidance_scale, self.device)

    def step(self, states: Sequence[DenoiseState]) -> list[DenoiseState]:
        """One batched forward over states of one latent shape and number of branches (what a batch key says).

        With true guidance both branches are in the batch, or one on each rank of the cfg axis. Nothing waits for the
        device.
        """
        return advance(states, self._velocities(states), self._sampler)

    def _velocities(self, states: Sequence[DenoiseState]) -> list[torch.Tensor]:
        """The prediction of each state, (C, 1, h, w) float32."""
        branches, count = len(states[0].conditioning.branches), len(states)
        assert all(len(s.conditioning.branches) == branches for s in states), "one guidance mode in a batch"
        own = own_branches(self.mesh, branches)
        steps = [self._schedule(s.request).timesteps[s.step] for s in states]
        timestep = torch.tensor(steps * len(own), dtype=torch.float32).to(self.device, non_blocking=True)
        latents = torch.stack([s.latents for s in states]).to(self.transformer.dtype).repeat(len(own), 1, 1, 1, 1)
        text = self._text(states, own)
        needs = partial(forward_bytes, self, [*states] * len(own), branches)
        predicted = self.graphs(self.transformer, latents, timestep, text, needs=needs)
        predicted = torch.unflatten(predicted.float(), 0, (len(own), count))
        whole = gather_branches(predicted, branches, group=self.mesh.group(Axis.CFG))
        if branches == 1:
            return list(whole[0])
        return [
            negative + (state.request.true_cfg_scale or 0.0) * (positive - negative)
            for state, positive, negative in zip(states, whole[0], whole[1], strict=True)
        ]

    def _text(self, states: Sequence[DenoiseState], own: range) -> FluxText:
        """Of each branch of `own` and each state, branches outermost."""
        prompts = [s.conditioning.branches[branch] for branch in own for s in states]
        guidance = None
        if self.transformer.config.guidance_embeds:
            scales = [s.guidance_scale for s in states] * len(own)
            guidance = torch.tensor(scales, dtype=torch.float32).to(self.device, non_blocking=True)
        return FluxText(torch.stack([p.words for p in prompts]), torch.stack([p.gist for p in prompts]), guidance)

    def decode(self, state: DenoiseState, cursor: None) -> tuple[FrameChunk, None]:
        """The picture, in one chunk."""
        with self.residency.on_device("vae"):
            return FrameChunk(self.vae.frames(state.latents)), None

    def preview(self, state: DenoiseState) -> torch.Tensor | None:
        """See `pipelines.preview`; None for a VAE whose factors are not known."""
        return self.colours.preview(state) if self.colours else None

    def save(self, state: DenoiseState) -> dict[str, torch.Tensor]:
        """See `pipelines.state_file`."""
        return save_state(state)

    def load(
        self, request: GenerationRequest, conditioning: FluxConditioning, tensors: dict[str, torch.Tensor]
    ) -> DenoiseState:
        """Inverse of `save`, on this pipeline's device. Raises JobFailed for a state of another request."""
        return load_state(tensors, request, conditioning, self.profile(request).latent_shape, self.device)

    def _sampler(self, request: GenerationRequest) -> Sampler:
        return make_sampler(request.sampler, self.flow)

    def _schedule(self, request: GenerationRequest) -> Schedule:
        return self._sampler(request).schedule(request.num_inference_steps, self.profile(request).tokens)


def load(spec: ModelSpec, options: LoadOptions) -> FluxPipeline:
    """Loads every component of `spec.root`. Raises ModelError naming what is missing, corrupt or unsupported."""
    flow, residency = read_image_config(spec.sampler), options.residency
    return FluxPipeline(
        spec=spec,
        device=options.device,
        mesh=options.mesh,
        flow=flow,
        transformer=load_transformer(spec.root / "transformer", options),
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
        residency=residency,
        graphs=options.graphs,
        colours=load_colours(options.vae_path or spec.root / "vae", options.device),
    )
