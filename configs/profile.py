"""What a job will cost, computed without torch from a model's config and a request.

The scheduler and the frontend know jobs only through these figures. Costs are in abstract units (TFLOP for denoising,
encoding and decoding alike); the scheduler's cost model learns milliseconds per unit from measured plans.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchKey:
    """States may share one forward only when these agree."""

    weights_id: str
    latent_shape: tuple[int, ...]  # (C, F, h, w)
    guided: bool
    text_bucket: int


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps [first_step, next phase's first_step) that run on one transformer."""

    first_step: int
    weights_id: str
    batch_key: BatchKey
    step_cost: float  # units of one step of one state, guidance included


@dataclass(frozen=True, slots=True)
class JobProfile:
    """Costs and bytes of one request on one model.

    `state_bytes` is held by one output's state between steps, `conditioning_bytes` by the job; `step_peak_bytes`,
    `encode_peak_bytes` and `decode_peak_bytes` are taken on top while the op runs. `chunk_bytes` is the largest decoded
    chunk: uint8 (frames, height, width, 3). `chunk_frames` lists the frames of each chunk.
    """

    family: str
    latent_shape: tuple[int, ...]
    tokens: int
    steps: int
    outputs: int
    phases: tuple[Phase, ...]
    encode_cost: float
    decode_chunk_cost: float
    chunk_frames: tuple[int, ...]
    chunk_bytes: int
    conditioning_bytes: int
    state_bytes: int
    encode_peak_bytes: int
    step_peak_bytes: int
    decode_peak_bytes: int
    prepare_cost: float = 0.0  # units of one output's preparation; 0: a moment whatever the request
    resumable: bool = True  # checkpoints are made and resumed from
    batchable: bool = True  # states with equal batch keys may share a forward

    def phase_at(self, step: int) -> Phase:
        """The phase that executes 0-based `step`."""
        return max((p for p in self.phases if p.first_step <= step), key=lambda p: p.first_step)

    @property
    def held_bytes(self) -> int:
        """Bytes held by an admitted job with one live state."""
        return self.conditioning_bytes + self.state_bytes

    @property
    def peak_bytes(self) -> int:
        """The largest working set of any single op."""
        return max(self.encode_peak_bytes, self.step_peak_bytes, self.decode_peak_bytes)

    @property
    def total_cost(self) -> float:
        """Units of the whole job."""
        denoise = sum(self.phase_at(s).step_cost for s in range(self.steps))
        each = self.prepare_cost + denoise + self.decode_chunk_cost * len(self.chunk_frames)
        return self.encode_cost + self.outputs * each
