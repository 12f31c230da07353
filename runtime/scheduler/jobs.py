"""A job, one attempt at it, and the straight line of ops that an attempt walks along.

    ENCODE -> per output: PREPARE -> DENOISE 0..steps-1 -> DECODE 0..chunks-1 -> SAVE (waits for the file)

An attempt has two cursors on that line: `planned` is where it will be when every plan sent has succeeded, `done` is
what all ranks acknowledged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from safelight.configs.profile import JobProfile
from safelight.runtime import messages as m
from safelight.runtime.scheduler.records import CheckpointRecord, TerminalRecord


class Stage(IntEnum):
    ENCODE = 0
    PREPARE = 1
    DENOISE = 2
    DECODE = 3
    SAVE = 4


WIRE_STAGE = {
    Stage.ENCODE: m.Stage.ENCODING,
    Stage.PREPARE: m.Stage.DENOISING,
    Stage.DENOISE: m.Stage.DENOISING,
    Stage.DECODE: m.Stage.DECODING,
    Stage.SAVE: m.Stage.SAVING,
}


@dataclass(frozen=True, slots=True)
class Cursor:
    """`k` is the next step in DENOISE, the next chunk in DECODE, and 0 elsewhere."""

    index: int
    stage: Stage
    k: int = 0

    def progress(self, profile: JobProfile) -> int:
        """How far along the job is, comparable between attempts; encoding counts as nothing, as it is repeated."""
        chunks = len(profile.chunk_frames)
        within = {
            Stage.ENCODE: 0,
            Stage.PREPARE: 0,
            Stage.DENOISE: 1 + self.k,
            Stage.DECODE: 1 + profile.steps + self.k,
            Stage.SAVE: 1 + profile.steps + chunks,
        }[self.stage]
        return self.index * (profile.steps + chunks + 2) + within

    def after(self, profile: JobProfile, resume: m.CheckpointRef | None) -> Cursor:
        """Where the next op leads; `resume` is what a PREPARE here starts from."""
        if self.stage == Stage.ENCODE:
            return Cursor(self.index, Stage.PREPARE)
        if self.stage == Stage.PREPARE:
            return at_step(self.index, resume.step if resume else 0, profile)
        if self.stage == Stage.DENOISE:
            return at_step(self.index, self.k + 1, profile)
        if self.stage == Stage.DECODE and self.k + 1 < len(profile.chunk_frames):
            return Cursor(self.index, Stage.DECODE, self.k + 1)
        return Cursor(self.index, Stage.SAVE)


def at_step(index: int, step: int, profile: JobProfile) -> Cursor:
    """The cursor of a state that has done `step` steps."""
    return Cursor(index, Stage.DENOISE, step) if step < profile.steps else Cursor(index, Stage.DECODE)


@dataclass(slots=True, eq=False)
class Job:
    """One accepted (or about to be accepted) job."""

    id: str
    owner: str
    seq: int
    body_sha256: bytes
    request: m.GenerationRequest
    profile: JobProfile
    attached: bool
    priority: m.Priority
    accepted_at: float
    deadline_at: float | None
    lease_until: float
    accepted: bool = False  # the submit is journalled
    attempt: int = -1  # the latest; -1 before the first
    run: Run | None = None
    queued_ms: float = 0.0  # predicted work while it waits
    told_position: int = -1  # in the queue, as output was told
    requeued: bool = False  # it ran before: goes to the front of the queue
    suspect_until: int | None = None  # progress it has to pass alone
    alone_deaths: int = 0
    home: int | None = None  # the group where it ran last
    home_epoch: int = -1
    checkpoint: CheckpointRecord | None = None
    leftover: list[str] = field(default_factory=list)  # checkpoint files to delete at the end
    artifacts: dict[int, m.Artifact] = field(default_factory=dict)
    terminal: TerminalRecord | None = None  # decided, not yet journalled
    passed_over: int = 0  # others that entered while this one was first and did not fit
    submitters: list[tuple[bytes, bool]] = field(default_factory=list)  # (identity, existing) waiting for Accepted
    cancellers: list[bytes] = field(default_factory=list)  # waiting for CancelAccepted
    forgetters: list[bytes] = field(default_factory=list)  # waiting for Forgotten: the record goes with the end
    origin: str = ""

    @property
    def next_index(self) -> int:
        """The first output without a file; `profile.outputs` when all are there."""
        return next(i for i in range(self.profile.outputs + 1) if i not in self.artifacts)

    @property
    def opening(self) -> m.OpenJob:
        """What output has to know before anything else of the job."""
        r = self.request
        return m.OpenJob(self.id, self.owner, r.media, r.fps, r.num_frames, r.height, r.width, r.num_outputs)

    @property
    def info(self) -> m.JobInfo:
        r = self.request
        return m.JobInfo(
            self.origin, r.prompt, r.height, r.width, r.num_frames, r.fps, r.num_inference_steps, r.seed,
            r.num_outputs, self.accepted_at,
        )  # fmt: skip

    def resume_ref(self, index: int) -> m.CheckpointRef | None:
        """The journalled checkpoint of an output."""
        if self.checkpoint is None or self.checkpoint.index != index or not self.profile.resumable:
            return None
        return self.checkpoint.ref


@dataclass(frozen=True, slots=True)
class Ended:
    """What is kept of a job whose terminal is journalled."""

    seq: int
    body_sha256: bytes
    opening: m.OpenJob
    terminal: TerminalRecord
    info: m.JobInfo

    @property
    def nbytes(self) -> int:
        return sum(artifact.nbytes for artifact in self.terminal.artifacts)


@dataclass(slots=True, eq=False)
class Run:
    """One attempt of a job in one group."""

    job: Job
    group: int
    attempt: int
    planned: Cursor
    done: Cursor
    take: int
    entered_at: float
    resume: m.CheckpointRef | None = None  # of the PREPARE ahead
    admitted: bool = False  # the admission is journalled: ops may be sent
    take_open: bool = False

    def op(self, slot: int) -> m.Op:
        """The next op to plan; `slot` is used by a decode only."""
        at, job = self.planned, self.job.id
        if at.stage == Stage.ENCODE:
            return m.Encode(job, self.attempt, self.job.request)
        if at.stage == Stage.PREPARE:
            return m.Prepare(job, self.attempt, at.index, self.resume)
        if at.stage == Stage.DENOISE:
            return m.Denoise((m.UnitRef(job, self.attempt, at.index, at.k),))
        return m.Decode(job, self.attempt, at.index, self.take, at.k, slot)

    @property
    def busy(self) -> bool:
        """Has work for the group that is not planned yet."""
        return self.planned.stage != Stage.SAVE

    @property
    def key(self) -> tuple[str, int]:
        return self.job.id, self.attempt

    def done_after(self, op: m.Op) -> Cursor | None:
        """Where `done` is after a successful op; None when the op belongs to an earlier take or output."""
        profile, at = self.job.profile, self.done
        if isinstance(op, m.Denoise):
            unit = op.units[0]
            return at_step(at.index, unit.step + 1, profile) if unit.index == at.index else None
        if isinstance(op, m.Decode):
            current = op.index == at.index and op.take == self.take
            return Cursor(at.index, Stage.DECODE, op.chunk).after(profile, None) if current else None
        if isinstance(op, m.Prepare):
            return Cursor(at.index, Stage.PREPARE).after(profile, op.resume) if op.index == at.index else None
        return Cursor(at.index, Stage.PREPARE) if isinstance(op, m.Encode) else None
