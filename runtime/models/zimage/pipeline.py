"""Z-Image text-to-image as a Pipeline: what diffusers' ZImagePipeline computes, one step of several jobs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from safelight.configs.families import FAMILIES, ModelSpec
from safelight.configs.families.zimage_costs import MOST_TEXT_TOKENS, PATCH
from safelight.configs.profile import JobProfile
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.encoders.qwen3 import Qwen3, load_qwen3
from safelight.runtime.models.residency import Residency
from safelight.runtime.models.vae.kl import KlVae, load_kl_vae
from safelight.runtime.models.vae.tiles import KL_BAND_ROWS
from safelight.runtime.models.zimage.transformer import ZImageText, ZImageTransformer
from safelight.runtime.models.zimage.weights import load_transformer
from safelight.runtime.parallel.cfg import gather_branches, own_branches
from safelight.runtime.parallel.mesh import Axis, ParallelMesh
from safelight.runtime.pipelines.conditioning import Branches, branch_names, ids_of
from safelight.runtime.pipelines.denoise import advance, forward_bytes, fresh_state
from safelight.runtime.pipelines.forward_graphs import ForwardGraphs
from safelight.runtime.pipelines.grouping import run_in_groups
from safelight.runtime.pipelines.preview import LatentColours, load_colours
from safelight.runtime.pipelines.protocol import DenoiseState, FrameChunk
from safelight.runtime.pipelines.state_file import load_state, save_state
from safelight.runtime.samplers import FlowConfig, Sampler, Schedule, make_sampler, read_image_config

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions


@dataclass(frozen=True, slots=True)
class ZImageConditioning(Branches):
    """Captions (T, E) as the transformer's own blocks made them, T a multiple of 32 with learned padding, which is
    content. The two may differ in length."""


@dataclass(frozen=True, slots=True)
class ZImagePipeline:
    """One loaded model. It holds no state of any job."""

    spec: ModelSpec
    device: torch.device
    mesh: ParallelMesh
    flow: FlowConfig
    transformer: ZImageTransformer
    text_encoder: Qwen3
    vae: KlVae
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

    def prepare(self, request: GenerationRequest, conditioning: ZImageConditioning, index: int) -> DenoiseState:
        """Noise of output `index`: float32 from a CPU generator seeded with seed + index, whole, then moved."""
        shape = self.profile(request).latent_shape
        sigmas = self._schedule(request, shape).sigmas
        return fresh_state(request, conditioning, index, shape, sigmas, request.guidance_scale, self.device)

    def step(self, states: Sequence[DenoiseState]) -> list[DenoiseState]:
        """Every state of one latent shape and guidance mode (what a batch key says) advances by a step.

        Predictions for captions of one length share a forward. Nothing waits for the device.
        """
        return advance(states, self._velocities(states), self._sampler)

    def _velocities(self, states: Sequence[DenoiseState]) -> list[torch.Tensor]:
        """The guided prediction of each state, (C, 1, h, w) float32. The network predicts its opposite.

        A state whose guidance is over (`cfg_truncation`) needs no unconditional prediction; on a cfg mesh, where
        another rank would wait, it is made nevertheless.
        """
        guided = states[0].conditioning.negative is not None
        assert all((s.conditioning.negative is not None) == guided for s in states), "one guidance mode in a batch"
        branches = 1 + guided
        own = own_branches(self.mesh, branches)
        alone = len(own) == branches
        over = [not guided or self._guidance_is_over(state) for state in states]
        wanted = [(branch, n) for branch in own for n in range(len(states)) if not (alone and branch and over[n])]
        inputs = [(states[n], states[n].conditioning.branch(branch)) for branch, n in wanted]
        made = dict(zip(wanted, run_in_groups(inputs, lambda pair: len(pair[1]), self._predict), strict=True))
        rows = [torch.stack([made.get((branch, n), made.get((0, n))) for n in range(len(states))]) for branch in own]  # type: ignore[misc]
        whole = gather_branches(torch.stack(rows), branches, group=self.mesh.group(Axis.CFG))
        return [-(whole[0][n] if over[n] else guide(whole[0][n], whole[1][n], state)) for n, state in enumerate(states)]

    def _guidance_is_over(self, state: DenoiseState) -> bool:
        """Whether the step's time is beyond `cfg_truncation`."""
        time = self._schedule(state.request, state.latents.shape).timesteps[state.step]
        after = state.request.cfg_truncation
        return after is not None and after <= 1 and float((1000 - np.float32(time)) / np.float32(1000)) > after

    def _predict(self, inputs: list[tuple[DenoiseState, torch.Tensor]]) -> list[torch.Tensor]:
        """One forward for states and their captions, all of one length -> N of (C, 1, h, w) float32."""
        states, captions = zip(*inputs, strict=True)
        times = [self._schedule(s.request, s.latents.shape).timesteps[s.step] for s in states]
        timestep = (1000 - torch.tensor(times, dtype=torch.float32)) / 1000
        latents = torch.stack([s.latents for s in states]).to(self.transformer.dtype)
        timestep, text = timestep.to(self.device, non_blocking=True), ZImageText(torch.stack(captions))
        needs = partial(forward_bytes, self, states, 1 + (states[0].conditioning.negative is not None))
        return list(self.graphs(self.transformer, latents, timestep, text, needs=needs).float())

    def decode(self, state: DenoiseState, cursor: None) -> tuple[FrameChunk, None]:
        """The picture, in one piece."""
        with self.residency.on_device("vae"):
            return FrameChunk(self.vae.frames(state.latents)), None

    def preview(self, state: DenoiseState) -> torch.Tensor | None:
        """See `pipelines.preview`; None for a VAE whose factors are not known."""
        return self.colours.preview(state) if self.colours else None

    def save(self, state: DenoiseState) -> dict[str, torch.Tensor]:
        """See `pipelines.state_file`."""
        return save_state(state)

    def load(
        self, request: GenerationRequest, conditioning: ZImageConditioning, tensors: dict[str, torch.Tensor]
    ) -> DenoiseState:
        """Inverse of `save`, on this pipeline's device. Raises JobFailed for a state of another request."""
        return load_state(tensors, request, conditioning, self.profile(request).latent_shape, self.device)

    def _sampler(self, request: GenerationRequest) -> Sampler:
        return make_sampler(request.sampler, self.flow)

    def _schedule(self, request: GenerationRequest, shape: tuple[int, ...]) -> Schedule:
        tokens = shape[-2] * shape[-1] // (PATCH * PATCH)
        return self._sampler(request).schedule(request.num_inference_steps, tokens)


def guide(cond: torch.Tensor, uncond: torch.Tensor, state: DenoiseState) -> torch.Tensor:
    """Both (C, 1, h, w) float32 -> the prediction that is followed: cond + scale * (cond - uncond), shortened to
    `cfg_normalization` lengths of cond where it is longer."""
    guided = cond + state.guidance_scale * (cond - uncond)
    longest = state.request.cfg_normalization
    if not longest:
        return guided
    limit: torch.Tensor = torch.linalg.vector_norm(cond) * longest
    return guided * torch.clamp(limit / torch.linalg.vector_norm(guided), max=1.0)


def load(spec: ModelSpec, options: LoadOptions) -> ZImagePipeline:
    """Loads every component of `spec.root`. Raises ModelError naming what is missing, corrupt or unsupported."""
    flow, residency = replace(read_image_config(spec.sampler), torch_table=True), options.residency
    vae = options.vae_path or spec.root / "vae"
    return ZImagePipeline(
        spec=spec,
        device=options.device,
        mesh=options.mesh,
        flow=flow,
        transformer=load_transformer(spec.root / "transformer", options),
        text_encoder=residency.load(
            "text_encoder", lambda home: load_qwen3(spec.root / "text_encoder", home, options.dit_dtype)
        ),
        vae=residency.load(
            "vae",
            lambda home: load_kl_vae(
                vae,
                home,
                options.vae_dtype,
                band_rows=KL_BAND_ROWS if options.vae_tiling else None,
                group=options.mesh.world,
            ),
        ),
        residency=residency,
        graphs=options.graphs,
        colours=load_colours(vae, options.device),
    )
