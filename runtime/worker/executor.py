"""Turns plans into pipeline calls, exactly as sent. Launches; never waits for the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from safelight.runtime.errors import JobFailed, NotFound, SafelightError
from safelight.runtime.messages import (
    Checkpoint,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRef,
    Decode,
    Denoise,
    Drop,
    Encode,
    ErrorInfo,
    FromWorker,
    GenerationRequest,
    HeldState,
    Op,
    OpResult,
    Plan,
    Prepare,
    Preview,
    Release,
    WorkerSpec,
)
from safelight.runtime.pipelines.protocol import DenoiseState, Pipeline
from safelight.runtime.worker.checkpoint import CheckpointWriter, SaveTask, read_checkpoint

# What a pipeline may raise for one job: a wrong shape, no memory, a broken checkpoint. Anything else is a bug of ours.
JOB_ERRORS = (SafelightError, ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
log = logging.getLogger(__name__)


@dataclass(slots=True)
class HeldJob:
    """Everything this rank holds of one (job, attempt)."""

    request: GenerationRequest
    conditioning: Any
    states: dict[int, DenoiseState] = field(default_factory=dict)
    cursors: dict[int, tuple[int, int, Any]] = field(default_factory=dict)  # index -> take, next chunk, cursor


@dataclass(frozen=True, slots=True)
class PendingChunk:
    """Decoded frames on their way to the host: `frames` (F, H, W, 3) uint8, complete when `copied` has passed."""

    op: Decode
    frames: torch.Tensor
    last: bool
    copied: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class PendingPreview:
    """A preview on its way to the host: `pixels` (h, w, 3) uint8, complete when `copied` has passed."""

    op: Preview
    pixels: torch.Tensor
    copied: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class LaunchedOp:
    """An op whose work is queued on the device (finished already on a CPU)."""

    error: ErrorInfo | None
    ms: float
    span: tuple[torch.cuda.Event, torch.cuda.Event] | None
    chunk: PendingChunk | None
    preview: PendingPreview | None = None


@dataclass(frozen=True, slots=True)
class Launched:
    plan: Plan
    ops: tuple[LaunchedOp, ...]


class Executor:
    """One rank's states and the pipeline. `execute` runs on the worker's main thread, under inference mode.

    On a group of one rank an exception in an op is an error of that op's job. On several ranks it propagates and ends
    the group, because the other ranks may wait in a collective; only what our own checks refuse before the first
    collective, alike on every rank, is an error of the job.
    """

    def __init__(
        self, pipeline: Pipeline, spec: WorkerSpec, checkpoints: CheckpointWriter, send: Callable[[FromWorker], None]
    ) -> None:
        self._pipeline = pipeline
        self._spec = spec
        self._checkpoints = checkpoints
        self._send = send
        self._jobs: dict[tuple[str, int], HeldJob] = {}
        self._cuda = pipeline.device.type == "cuda"
        self._copy_stream = torch.cuda.Stream(pipeline.device) if self._cuda else None  # type: ignore[no-untyped-call]

    def held(self) -> tuple[HeldState, ...]:
        """Inventory of states; called on the link's thread, hence the copies."""
        found = []
        for (job, attempt), held in list(self._jobs.items()):
            found.append(HeldState(job, attempt, -1, 0))
            found += [HeldState(job, attempt, i, s.step) for i, s in list(held.states.items())]
        return tuple(found)

    def execute(self, plan: Plan) -> Launched:
        """Launches every op in order; results are complete once the completer has waited for their events."""
        return Launched(plan, tuple(self._launch(op) for op in plan.ops))

    def _launch(self, op: Op) -> LaunchedOp:
        begin = self._event()
        started = time.perf_counter()
        error: ErrorInfo | None = None
        made: PendingChunk | PendingPreview | None = None
        try:
            made = self._run(op)
        except JOB_ERRORS as failure:
            alone = self._spec.world_size == 1 or _precedes_collectives(op, failure)
            if not alone or (self._cuda and isinstance(failure, torch.AcceleratorError)):
                raise
            error = error_info(failure)
        end = self._event()
        ms = (time.perf_counter() - started) * 1000
        span = (begin, end) if begin and end else None
        if isinstance(made, PendingPreview):
            return LaunchedOp(error, ms, span, None, made)
        return LaunchedOp(error, ms, span, made)

    def _event(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _run(self, op: Op) -> PendingChunk | PendingPreview | None:
        match op:
            case Encode(job, attempt, request):
                self._jobs[job, attempt] = HeldJob(request, self._pipeline.encode(request))
            case Prepare():
                self._prepare(op)
            case Denoise():
                self._denoise(op)
            case Decode():
                return self._decode(op)
            case Checkpoint():
                self._checkpoint(op)
            case Preview():
                return self._preview(op)
            case Release(job, attempt, index):
                held = self._held_job(job, attempt)
                if (state := held.states.pop(index, None)) is not None:
                    state.close()
                held.cursors.pop(index, None)
            case Drop(job, attempt):
                if (dropped := self._jobs.pop((job, attempt), None)) is not None:
                    for state in dropped.states.values():
                        state.close()
        return None

    def _held_job(self, job: str, attempt: int) -> HeldJob:
        try:
            return self._jobs[job, attempt]
        except KeyError:
            raise NotFound(f"attempt {attempt} of job {job} is not held here") from None

    def _state(self, job: str, attempt: int, index: int) -> DenoiseState:
        try:
            return self._held_job(job, attempt).states[index]
        except KeyError:
            raise NotFound(f"output {index} of job {job} is not held here") from None

    def _prepare(self, op: Prepare) -> None:
        held = self._held_job(op.job, op.attempt)
        if op.resume is None:
            held.states[op.index] = self._pipeline.prepare(held.request, held.conditioning, op.index)
            return
        if not self._spec.checkpoint_dir:
            raise JobFailed(
                f"checkpoint {op.resume.path} is not seen by every rank; share --state-dir between the nodes"
            )
        tensors = read_checkpoint(op.resume)
        held.states[op.index] = self._pipeline.load(held.request, held.conditioning, tensors)

    def _denoise(self, op: Denoise) -> None:
        states = [self._state(u.job, u.attempt, u.index) for u in op.units]
        for unit, state in zip(op.units, states, strict=True):
            if state.step != unit.step:
                raise NotFound(f"job {unit.job} is at step {state.step} here, the plan says {unit.step}")
        for unit, state in zip(op.units, self._pipeline.step(states), strict=True):
            self._jobs[unit.job, unit.attempt].states[unit.index] = state

    def _decode(self, op: Decode) -> PendingChunk | None:
        state = self._state(op.job, op.attempt, op.index)
        held = self._held_job(op.job, op.attempt)
        if self._spec.rank != 0 and not self._pipeline.collective_decode:
            return None  # every rank holds whole latents; one of them decodes
        cursor = None
        if op.chunk > 0:
            take, expected, cursor = held.cursors.get(op.index, (-1, 0, None))
            if (take, expected) != (op.take, op.chunk) or cursor is None:
                raise NotFound(f"chunk {expected} of take {take} would be next of job {op.job}, not {op.chunk}")
        decoded, cursor = self._pipeline.decode(state, cursor)
        held.cursors[op.index] = (op.take, op.chunk + 1, cursor)
        if self._spec.rank != 0:
            return None  # it did its share; rank 0 has all frames
        frames, copied = self._to_host(decoded.frames)
        return PendingChunk(op, frames, cursor is None, copied)

    def _preview(self, op: Preview) -> PendingPreview | None:
        """Rank 0 makes it, as latents are whole on every rank. Whatever fails but the device is logged and forgotten:
        no job and no group ends for a preview."""
        if self._spec.rank != 0:
            return None
        try:
            state = self._state(op.job, op.attempt, op.index)
            pixels = self._pipeline.preview(state) if state.step == op.step else None
            return None if pixels is None else PendingPreview(op, *self._to_host(pixels))
        except JOB_ERRORS as failure:
            if isinstance(failure, torch.AcceleratorError):
                raise
            log.warning("job %s: no preview of step %d: %s", op.job, op.step, failure)
            return None

    def _to_host(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if self._copy_stream is None or frames.device.type == "cpu":
            return frames.contiguous(), None
        host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
        self._copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copy_stream):
            host.copy_(frames, non_blocking=True)
            frames.record_stream(self._copy_stream)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return host, copied

    def _checkpoint(self, op: Checkpoint) -> None:
        state = self._state(op.job, op.attempt, op.index)
        if self._spec.rank != 0:
            return
        self._checkpoints.submit(
            SaveTask(
                name=f"{op.job}-{op.attempt}-{op.index}",
                step=state.step,
                tensors=partial(self._pipeline.save, state),
                after=self._event(),
                report=partial(self._report_checkpoint, op),
            )
        )

    def _report_checkpoint(self, op: Checkpoint, outcome: CheckpointRef | ErrorInfo) -> None:
        place = (self._spec.group, self._spec.group_epoch, op.job, op.attempt, op.index)
        if isinstance(outcome, CheckpointRef):
            self._send(CheckpointCommitted(*place, ref=outcome))
        else:
            self._send(CheckpointFailed(*place, error=outcome))


def _precedes_collectives(op: Op, failure: Exception) -> bool:
    """Whether a check of ours refused the op: an attempt or step that is not here, or a request or checkpoint."""
    return isinstance(failure, NotFound) or (isinstance(op, Encode | Prepare) and isinstance(failure, SafelightError))


def error_info(failure: BaseException) -> ErrorInfo:
    """The wire form of an exception: typed errors keep their code, others are failures of the job."""
    if isinstance(failure, SafelightError):
        return ErrorInfo(failure.code, failure.message, failure.param)
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError)):
        return ErrorInfo(JobFailed.code, f"the device has not enough memory for this job: {failure}")
    return ErrorInfo(JobFailed.code, f"{type(failure).__name__}: {failure}")


def result_of(launched: LaunchedOp) -> OpResult:
    """The reported outcome of an op, once its events have passed."""
    ms = launched.span[0].elapsed_time(launched.span[1]) if launched.span and not launched.error else launched.ms
    if launched.chunk is None:
        return OpResult(ms=ms, error=launched.error)
    return OpResult(ms, launched.error, launched.chunk.last, int(launched.chunk.frames.shape[0]))
