"""Around a native pipeline's forward: an output's first state, and a step along a prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

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
