"""What a pipeline gives the executor, and the state that passes between its stages.

`step` and `decode` never change their arguments: they return new states, so a failed op leaves the job as it was and
k steps + save + load + the rest equals the uninterrupted run bitwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from safelight.configs.profile import JobProfile
from safelight.runtime.messages import GenerationRequest


@dataclass(frozen=True, slots=True)
class SamplerState:
    """Everything a sampler remembers between steps; the sampler object itself is stateless.

    `model_outputs` are the converted predictions of earlier steps, newest last (UniPC: up to its order), `last_sample`
    the sample before the latest predictor step, `order` the order that the latest step used. `velocity` is the latest
    prediction, of samplers that keep no model outputs; it serves previews alone and is not saved.
    """

    model_outputs: tuple[torch.Tensor, ...] = ()
    last_sample: torch.Tensor | None = None
    order: int = 0
    velocity: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class DenoiseState:
    """One output's latents between steps, whole on every rank.

    latents: (C, F, h, w) float32; `step` counts steps done; `sigmas`: (steps + 1,) float32 on CPU; `rng_state` is the
    generator state for stochastic samplers. `conditioning` is shared by the outputs of a job and is not serialised.
    """

    latents: torch.Tensor
    step: int
    sigmas: torch.Tensor
    sampler: SamplerState
    rng_state: torch.Tensor
    guidance_scale: float
    conditioning: Any
    request: GenerationRequest
    index: int

    def close(self) -> None:
        """Nothing lives outside of this state."""


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """Decoded frames, uint8 (F, H, W, 3), still on the pipeline's device."""

    frames: torch.Tensor


class Pipeline(Protocol):
    """One model, loaded. All methods run under torch.inference_mode, on the executor's thread.

    Of a state the executor reads only `step`, and calls `close()` when it holds it no longer.
    """

    @property
    def device(self) -> torch.device:
        """Where latents live."""

    @property
    def collective_decode(self) -> bool:
        """Whether all ranks of a group must call `decode`, with the same arguments; rank 0's frames are delivered."""

    def weights_bytes(self) -> int:
        """Bytes of all resident weights."""

    def profile(self, request: GenerationRequest) -> JobProfile:
        """The same profile that the scheduler computed."""

    def encode(self, request: GenerationRequest) -> Any:
        """The family's Conditioning for a request."""

    def prepare(self, request: GenerationRequest, conditioning: Any, index: int) -> DenoiseState:
        """Fresh noise for output `index` (seed + index)."""

    def step(self, states: Sequence[DenoiseState]) -> list[DenoiseState]:
        """One batched forward; every state advances by one step, whatever its timestep, guidance or step count."""

    def decode(self, state: DenoiseState, cursor: Any | None) -> tuple[FrameChunk, Any | None]:
        """The next chunk of frames of a finished state; a None cursor starts, a None cursor returned ends."""

    def preview(self, state: DenoiseState) -> torch.Tensor | None:
        """What the picture will be, as far as can be told after the latest step: uint8 (h, w, 3) on the device, one
        pixel for each place of the latents; None if it cannot be told. Cheap; waits for nothing. See pipelines.preview.
        """

    def save(self, state: DenoiseState) -> dict[str, torch.Tensor]:
        """The versioned tensor form of a state (for safetensors): tensors on the CPU, scalars as tensors."""

    def load(self, request: GenerationRequest, conditioning: Any, tensors: dict[str, torch.Tensor]) -> DenoiseState:
        """Inverse of `save`."""
