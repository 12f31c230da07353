"""What the pipelines of our own families have alike: everything but encoding, the network's inputs, and guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safelight.configs.families import FAMILIES, ModelSpec
from safelight.configs.profile import JobProfile
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.layers.block_pass import BlockPass
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.residency import Residency
from safelight.runtime.parallel.cfg import gather_branches, own_branches
from safelight.runtime.parallel.mesh import Axis, ParallelMesh
from safelight.runtime.pipelines.ahead import Ahead
from safelight.runtime.pipelines.conditioning import Conditioning
from safelight.runtime.pipelines.denoise import advance, fresh_state
from safelight.runtime.pipelines.forward_graphs import ForwardGraphs
from safelight.runtime.pipelines.grouping import run_in_groups
from safelight.runtime.pipelines.preview import LatentColours, load_colours
from safelight.runtime.pipelines.protocol import DenoiseState, FrameChunk
from safelight.runtime.pipelines.state_file import load_state, save_state
from safelight.runtime.samplers import FlowConfig, Sampler, Schedule, make_sampler

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions


class Denoiser(Protocol):
    """A family's transformer."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations between the float32 islands."""

    __call__: Any  # (latents (B, C, F, h, w), timestep (B,), conditioning) -> the prediction, (B, C, F, h, w)


class Vae(Protocol):
    """A loaded VAE; its ranks share every decode when it has a `group`."""

    @property
    def module(self) -> Any: ...

    @property
    def group(self) -> dist.ProcessGroup | None: ...

    def decode(self, latents: Tensor, cursor: Any) -> tuple[Tensor, Any]:
        """(C, F, h, w) and a cursor, None at the start -> the next uint8 (F', H, W, 3), and a cursor, None at the
        end."""


D = TypeVar("D", bound=Denoiser)
V = TypeVar("V", bound=Vae)
Part = tuple[int, DenoiseState]  # a branch of guidance, 0 the conditional one, and the state whose it is


@dataclass(frozen=True, slots=True, kw_only=True)
class NativePipeline(ABC, Generic[D, V]):
    """One loaded model. It holds no state of any job. The methods of `pipelines.protocol.Pipeline` without a docstring
    here do what it says there.

    A family adds its text encoders and the methods that are abstract here, and overrides what it does in a way of its
    own. Nothing in a step waits for the device.
    """

    spec: ModelSpec
    device: torch.device
    mesh: ParallelMesh
    flow: FlowConfig
    transformer: D
    vae: V
    residency: Residency = field(default_factory=Residency)
    graphs: ForwardGraphs = field(default_factory=ForwardGraphs)
    ahead: Ahead = field(default_factory=Ahead)
    colours: LatentColours | None = None

    # ---- a family's own

    @property
    @abstractmethod
    def modules(self) -> tuple[nn.Module, ...]:
        """All that have weights."""

    @abstractmethod
    def encode(self, request: GenerationRequest) -> Any:
        """The request's token ids (and pictures) -> the family's conditioning, of one branch unless it is guided.

        Raises InvalidRequest when ids are missing or more than fit.
        """

    @abstractmethod
    def inputs(self, parts: Sequence[Part]) -> Any:
        """The transformer's conditioning for one forward over these samples, which have equal shapes."""

    @abstractmethod
    def schedule(self, request: GenerationRequest) -> Schedule:
        """The sampler's times."""

    def scale(self, request: GenerationRequest) -> float:
        """The guidance scale of the request's states."""
        return request.guidance_scale

    def timesteps(self, times: Sequence[float]) -> Tensor:
        """The schedule's times of a batch, 1000 to 0 -> what the network reads, (B,) float32 on the CPU."""
        return torch.tensor(times, dtype=torch.float32)

    def guide(self, cond: Tensor, uncond: Tensor, state: DenoiseState) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598): both predictions (C, F, h, w) float32 -> what is followed."""
        return uncond + state.guidance_scale * (cond - uncond)

    def is_guided(self, state: DenoiseState) -> bool:
        """Whether the next step of a guided request is."""
        return True

    def predictions_counted(self, state: DenoiseState) -> int:
        """How many predictions `step_peak_bytes` of the state's profile is for: by default all branches at once."""
        conditioning: Conditioning = state.conditioning
        return conditioning.count

    # ---- the same for all

    @property
    def collective_decode(self) -> bool:
        return self.vae.group is not None

    def weights_bytes(self) -> int:
        """Bytes of all resident weights, and room for those that move in and for what is made ahead."""
        return self.residency.weights_bytes(*self.modules) + self.ahead.room

    def profile(self, request: GenerationRequest) -> JobProfile:
        return FAMILIES[self.spec.family].profile(self.spec, SamplingParams.of(request))

    def prepare(self, request: GenerationRequest, conditioning: Any, index: int) -> DenoiseState:
        """Noise of output `index`: float32 from a CPU generator seeded with seed + index, whole, then moved."""
        shape, sigmas = self.profile(request).latent_shape, self.schedule(request).sigmas
        return fresh_state(request, conditioning, index, shape, sigmas, self.scale(request), self.device)

    def step(self, states: Sequence[DenoiseState]) -> list[DenoiseState]:
        """Every state, all of one latent shape and number of branches (what a batch key says), advances by a step."""
        return advance(states, self.velocities(states), self.sampler)

    def velocities(self, states: Sequence[DenoiseState]) -> list[Tensor]:
        """What each state follows, (C, F, h, w) float32: one forward for all samples of one shape, or with a cfg axis
        for those of the rank's branch.

        A state whose guidance is over needs no unconditional prediction; where another rank waits for it, it is made
        nevertheless.
        """
        branches = branches_of(states)
        own = own_branches(self.mesh, branches)
        alone = len(own) == branches
        guided = [branches == 2 and self.is_guided(state) for state in states]
        wanted = [(branch, n) for branch in own for n, both in enumerate(guided) if branch == 0 or both or not alone]
        predicted = self.predict([(branch, states[n]) for branch, n in wanted])
        made = dict(zip(wanted, predicted, strict=True))
        rows = [[made[(branch, n) if (branch, n) in made else (0, n)] for n in range(len(states))] for branch in own]
        by_branch = torch.stack([torch.stack(row) for row in rows])
        whole = gather_branches(by_branch, branches, group=self.mesh.group(Axis.CFG))
        return [
            self.guide(whole[0][n], whole[1][n], state) if guided[n] else whole[0][n] for n, state in enumerate(states)
        ]

    def predict(self, parts: Sequence[Part]) -> list[Tensor]:
        """The velocity of each, (C, F, h, w) float32; one forward for each shape of conditioning.

        Where blocks are streamed, all forwards share one pass over them.
        """
        return run_in_groups(parts, lambda part: part[1].conditioning.shapes(part[0]), self._forwards)

    def _forwards(self, groups: list[list[Part]]) -> list[list[Tensor]]:
        transformer = self.transformer
        if len(groups) > 1 and self.residency.streams and isinstance(transformer, BlockPass):
            made = transformer.together([self._arguments(parts) for parts in groups])
        else:
            made = [self._forward(parts) for parts in groups]
        return [list(predicted.float()) for predicted in made]

    def _forward(self, parts: list[Part]) -> Tensor:
        needs = partial(self.forward_bytes, [state for _, state in parts])
        predicted: Tensor = self.graphs(self.transformer, *self._arguments(parts), needs=needs)
        return predicted

    def _arguments(self, parts: list[Part]) -> tuple[Tensor, Tensor, Any]:
        states = [state for _, state in parts]
        times = self.timesteps([self.schedule(s.request).timesteps[s.step] for s in states])
        latents = torch.stack([s.latents for s in states]).to(self.transformer.dtype)
        return latents, times.to(self.device, non_blocking=True), self.inputs(parts)

    def forward_bytes(self, states: Sequence[DenoiseState]) -> int:
        """Activations of a forward on one rank, about; `states`: that of each sample. Profiles are of float32 on one
        rank."""
        whole = sum(self.profile(state.request).step_peak_bytes for state in states)
        one = whole // self.predictions_counted(states[0])
        return one * self.transformer.dtype.itemsize // (4 * self.mesh.sequence_size)

    def decode(self, state: DenoiseState, cursor: Any | None) -> tuple[FrameChunk, Any | None]:
        with self.residency.on_device("vae") as visit:
            frames, following = self.vae.decode(state.latents, cursor)
            visit.more = following is not None
        return FrameChunk(frames), following

    def preview(self, state: DenoiseState) -> Tensor | None:
        return self.colours.preview(state) if self.colours else None

    def save(self, state: DenoiseState) -> dict[str, Tensor]:
        return save_state(state)

    def load(self, request: GenerationRequest, conditioning: Any, tensors: dict[str, Tensor]) -> DenoiseState:
        """Inverse of `save`, on this pipeline's device. Raises JobFailed for a state of another request."""
        state = load_state(tensors, request, conditioning, self.profile(request).latent_shape, self.device)
        return replace(state, guidance_scale=self.scale(request))

    def sampler(self, request: GenerationRequest) -> Sampler:
        return make_sampler(request.sampler, self.flow)


def branches_of(states: Sequence[DenoiseState]) -> int:
    """How many predictions a step of these states needs, the same for each."""
    (count,) = {state.conditioning.count for state in states}
    return int(count)


def loaded_alike(spec: ModelSpec, options: LoadOptions) -> dict[str, Any]:
    """The fields of a NativePipeline that no family loads in a way of its own."""
    return {
        "spec": spec,
        "device": options.device,
        "mesh": options.mesh,
        "residency": options.residency,
        "graphs": options.graphs,
        "colours": load_colours(options.vae_path or spec.root / "vae", options.device),
    }
