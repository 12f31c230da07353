"""Wan 2.1 text-to-video as a Pipeline: what diffusers' WanPipeline computes, one step of several jobs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from safelight.configs.families import FAMILIES, ModelSpec
from safelight.configs.families.wan_costs import TEXT_TOKENS
from safelight.configs.profile import JobProfile
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.encoders.umt5 import UMT5, load_umt5
from safelight.runtime.models.residency import Residency
from safelight.runtime.models.vae.tiles import WAN_BAND_ROWS
from safelight.runtime.models.vae.wan import DecodeCursor, WanVae, load_wan_vae
from safelight.runtime.models.wan.transformer import WanText, WanTransformer
from safelight.runtime.models.wan.weights import load_transformer
from safelight.runtime.parallel.cfg import gather_branches, own_branches
from safelight.runtime.parallel.mesh import Axis, ParallelMesh
from safelight.runtime.pipelines.conditioning import Branches, branch_names, ids_of
from safelight.runtime.pipelines.denoise import advance, forward_bytes, fresh_state
from safelight.runtime.pipelines.forward_graphs import ForwardGraphs
from safelight.runtime.pipelines.preview import LatentColours, load_colours
from safelight.runtime.pipelines.protocol import DenoiseState, FrameChunk
from safelight.runtime.pipelines.state_file import load_state, save_state
from safelight.runtime.samplers import FlowConfig, Sampler, make_sampler, read_config

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions


@dataclass(frozen=True, slots=True)
class WanConditioning(Branches):
    """Text embeddings (T, text_dim) in the transformer's dtype, zero-padded to T = 512: the zeros are content."""


@dataclass(frozen=True, slots=True)
class WanPipeline:
    """One loaded model. It holds no state of any job."""

    spec: ModelSpec
    device: torch.device
    mesh: ParallelMesh
    flow: FlowConfig
    transformer: WanTransformer
    text_encoder: UMT5
    vae: WanVae
    residency: Residency = field(default_factory=Residency)
    graphs: ForwardGraphs = field(default_factory=ForwardGraphs)
    colours: LatentColours | None = None

    @property
    def collective_decode(self) -> bool:
        """The ranks share every frame."""
        return self.vae.group is not None

    def weights_bytes(self) -> int:
        """Bytes of all resident weights, and room for those that move in."""
        return self.residency.weights_bytes(self.transformer, self.text_encoder.module, self.vae.module)

    def profile(self, request: GenerationRequest) -> JobProfile:
        """The profile that frontend and scheduler compute from the same request."""
        return FAMILIES[self.spec.family].profile(self.spec, SamplingParams.of(request))

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

    def prepare(self, request: GenerationRequest, conditioning: WanConditioning, index: int) -> DenoiseState:
        """Noise of output `index`: float32 from a CPU generator seeded with seed + index, whole, then moved."""
        shape = self.profile(request).latent_shape
        sigmas = self._sampler(request).schedule(request.num_inference_steps).sigmas
        return fresh_state(request, conditioning, index, shape, sigmas, request.guidance_scale, self.device)

    def step(self, states: Sequence[DenoiseState]) -> list[DenoiseState]:
        """One batched forward over states of one latent shape and guidance mode (what a batch key says).

        With guidance both branches are in the batch, or one on each rank of the cfg axis. Nothing waits for the device.
        """
        return advance(states, self._velocities(states), self._sampler)

    def _velocities(self, states: Sequence[DenoiseState]) -> list[torch.Tensor]:
        """The guided prediction of each state, (C, F, h, w) float32."""
        guided = states[0].conditioning.negative is not None
        assert all((s.conditioning.negative is not None) == guided for s in states), "one guidance mode in a batch"
        branches, count = 1 + guided, len(states)
        own = own_branches(self.mesh, branches)
        steps = [self._sampler(s.request).schedule(s.request.num_inference_steps).timesteps[s.step] for s in states]
        timestep = torch.tensor(steps * len(own), dtype=torch.float32).to(self.device, non_blocking=True)
        latents = torch.stack([s.latents for s in states]).to(self.transformer.dtype).repeat(len(own), 1, 1, 1, 1)
        text = WanText(torch.stack([s.conditioning.branch(branch) for branch in own for s in states]))
        needs = partial(forward_bytes, self, [*states] * len(own), branches)
        predicted = self.graphs(self.transformer, latents, timestep, text, needs=needs)
        predicted = torch.unflatten(predicted.float(), 0, (len(own), count))
        whole = gather_branches(predicted, branches, group=self.mesh.group(Axis.CFG))
        if not guided:
            return list(whole[0])
        return [
            uncond + state.guidance_scale * (cond - uncond)
            for state, cond, uncond in zip(states, whole[0], whole[1], strict=True)
        ]

    def decode(self, state: DenoiseState, cursor: DecodeCursor | None) -> tuple[FrameChunk, DecodeCursor | None]:
        """The next latent frame's frames: 1, then 4 at a time."""
        with self.residency.on_device("vae") as visit:
            frames, following = self.vae.decode(state.latents, cursor)
            visit.more = following is not None
        return FrameChunk(frames), following

    def preview(self, state: DenoiseState) -> torch.Tensor | None:
        """See `pipelines.preview`; None for a VAE whose factors are not known."""
        return self.colours.preview(state) if self.colours else None

    def save(self, state: DenoiseState) -> dict[str, torch.Tensor]:
        """See `pipelines.state_file`."""
        return save_state(state)

    def load(
        self, request: GenerationRequest, conditioning: WanConditioning, tensors: dict[str, torch.Tensor]
    ) -> DenoiseState:
        """Inverse of `save`, on this pipeline's device. Raises JobFailed for a state of another request."""
        return load_state(tensors, request, conditioning, self.profile(request).latent_shape, self.device)

    def _sampler(self, request: GenerationRequest) -> Sampler:
        return make_sampler(request.sampler, self.flow)


def load(spec: ModelSpec, options: LoadOptions) -> WanPipeline:
    """Loads every component of `spec.root`. Raises ModelError naming what is missing, corrupt or unsupported."""
    flow = read_config(spec.sampler)
    residency = options.residency
    return WanPipeline(
        spec=spec,
        device=options.device,
        mesh=options.mesh,
        flow=flow,
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
        residency=residency,
        graphs=options.graphs,
        colours=load_colours(options.vae_path or spec.root / "vae", options.device),
    )
