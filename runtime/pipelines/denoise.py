"""What native pipelines do alike around their forward: an output's first state, its memory, and a step along a
prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from safelight.configs.profile import JobProfile
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.pipelines.protocol import DenoiseState, SamplerState
from safelight.runtime.samplers import Sampler


def fresh_state(
    request: GenerationRequest,
    conditioning: Any,
    index: int,
    shape: Sequence[int],
    sigmas: torch.Tensor,
    guidance_scale: float,
    device: torch.device,
) -> DenoiseState:
    """Noise of output `index`: float32 from a CPU generator seeded with seed + index, whole, then moved."""
    generator = torch.Generator("cpu").manual_seed(request.seed + index)
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
    return DenoiseState(
        latents=noise.to(device),
        step=0,
        sigmas=sigmas,
        sampler=SamplerState(),
        rng_state=generator.get_state(),
        guidance_scale=guidance_scale,
        conditioning=conditioning,
        request=request,
        index=index,
    )


class _Loaded(Protocol):
    """What `forward_bytes` reads of a pipeline."""

    @property
    def mesh(self) -> _Ranks: ...

    @property
    def transformer(self) -> _Typed: ...

    def profile(self, request: GenerationRequest) -> JobProfile: ...


class _Ranks(Protocol):
    @property
    def sequence_size(self) -> int: ...


class _Typed(Protocol):
    @property
    def dtype(self) -> torch.dtype: ...


def forward_bytes(pipeline: _Loaded, samples: Sequence[DenoiseState], branches: int) -> int:
    """Activations of a forward on one rank, about. `samples`: the state of each; `branches`: how many samples of a
    state its profile counts, which is of float32 on one rank."""
    whole = sum(pipeline.profile(state.request).step_peak_bytes for state in samples) // branches
    return whole * pipeline.transformer.dtype.itemsize // (4 * pipeline.mesh.sequence_size)


def advance(
    states: Sequence[DenoiseState],
    velocities: Sequence[torch.Tensor],
    sampler_of: Callable[[GenerationRequest], Sampler],
) -> list[DenoiseState]:
    """Every state one step on along its velocity, (C, F, h, w) float32. Nothing waits for the device."""
    advanced = []
    for state, velocity in zip(states, velocities, strict=True):
        sampler = sampler_of(state.request)
        latents, memory = sampler.step(state.sigmas.tolist(), state.step, state.latents, velocity, state.sampler)
        advanced.append(replace(state, latents=latents, step=state.step + 1, sampler=memory))
    return advanced
