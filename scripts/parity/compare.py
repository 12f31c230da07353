"""What the parity tables and tests of all families share: tolerances, runs of ours, pipelines with something wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from safelight.configs.families import identify
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState

TOLERANCE = 1e-4  # max abs error of latents, float32 on the CPU
CONTROL_FACTOR = 50  # what a negative control must exceed


def load_ours(folder: Path) -> Any:
    """Our pipeline, float32 on the CPU."""
    options = LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, ParallelMesh.single())
    return load_pipeline(folder, options)


def load_tokenizer(folder: Path) -> Any:
    """The family's tokenizer for a checkpoint."""
    from safelight.entrypoints import jobs

    return jobs.load_tokenizer(identify(folder))


@torch.inference_mode()
def run(pipeline: Any, request: GenerationRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """-> latents (N, C, F, h, w) and uint8 frames (N, F, H, W, 3) of all outputs, denoised as one batch."""
    conditioning = pipeline.encode(request)
    states = [pipeline.prepare(request, conditioning, index) for index in range(request.num_outputs)]
    for _ in range(request.num_inference_steps):
        states = pipeline.step(states)
    return torch.stack([s.latents for s in states]), torch.stack([decode_all(pipeline, s) for s in states])


def decode_all(pipeline: Any, state: DenoiseState) -> torch.Tensor:
    """All frames of a state, chunk by chunk."""
    chunk, cursor = pipeline.decode(state, None)
    chunks = [chunk.frames]
    while cursor is not None:
        chunk, cursor = pipeline.decode(state, cursor)
        chunks.append(chunk.frames)
    return torch.cat(chunks)


def errors(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, int]:
    """Max abs error of latents, and of frames in 8-bit levels."""
    return float((ours[0] - theirs[0]).abs().max()), int((ours[1].int() - theirs[1].int()).abs().max())


class Broken:
    """The transformer with something wrong on the way in."""

    def __init__(self, inner: Any, spoil: Callable[..., Any]) -> None:
        self.inner, self.spoil = inner, spoil

    def __call__(self, *arguments: Any) -> Any:
        return self.spoil(self.inner, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def breaking(spoil: Callable[..., Any]) -> Callable[[Any], Any]:
    """Of a pipeline, one whose transformer's call is `spoil(transformer, latents, timestep, conditioning)`."""
    return lambda pipeline: replace(pipeline, transformer=Broken(pipeline.transformer, spoil))


@dataclass(frozen=True, slots=True)
class Control:
    """Ours with one thing wrong: `spoil` changes the pipeline, `case` the request."""

    name: str
    spoil: Callable[[Any], Any] = lambda pipeline: pipeline
    case: Any = None  # the family's first
