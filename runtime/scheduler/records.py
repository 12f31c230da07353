"""The journal's records, and the history of a job that they replay to. Times are seconds since 1970."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from safelight.runtime.messages import (
    Artifact,
    CheckpointRef,
    ErrorInfo,
    GenerationRequest,
    Priority,
    Status,
)


class _Record(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, omit_defaults=True):
    job: str

    @property
    def part(self) -> int:
        """Tells records of one kind and job apart; a later record replaces an earlier one of the same part."""
        return 0


class SubmitRecord(_Record, frozen=True):
    owner: str
    seq: int  # order of acceptance
    body_sha256: bytes
    request: GenerationRequest
    attached: bool
    priority: Priority
    accepted_at: float
    deadline_at: float | None = None
    origin: str = ""


class AdmissionRecord(_Record, frozen=True):
    """Written before the first op of an attempt is sent, so that no attempt number is ever used twice."""

    attempt: int
    group: int
    group_epoch: int
    suspect_until: int | None = None
    alone_deaths: int = 0


class CheckpointRecord(_Record, frozen=True):
    attempt: int
    index: int
    ref: CheckpointRef


class ArtifactRecord(_Record, frozen=True):
    artifact: Artifact

    @property
    def part(self) -> int:
        return self.artifact.index


class TerminalRecord(_Record, frozen=True):
    """The one end of a job; the first one wins."""

    status: Status
    artifacts: tuple[Artifact, ...] = ()
    error: ErrorInfo | None = None
    at: float = 0.0


class ForgetRecord(_Record, frozen=True):
    """Deletes everything about a job that ended: long ago, or its client wants it gone."""


Record = SubmitRecord | AdmissionRecord | CheckpointRecord | ArtifactRecord | TerminalRecord | ForgetRecord


@dataclass(slots=True)
class History:
    """What the journal knows of one job."""

    submit: SubmitRecord
    admission: AdmissionRecord | None = None
    checkpoint: CheckpointRecord | None = None
    artifacts: dict[int, Artifact] = field(default_factory=dict)
    terminal: TerminalRecord | None = None


def replay(records: Iterable[Record]) -> list[History]:
    """The histories of all jobs, in order of acceptance. Records of one job come in the order they were written."""
    jobs: dict[str, History] = {}
    for record in records:
        if isinstance(record, SubmitRecord):
            jobs.setdefault(record.job, History(record))
        elif isinstance(record, ForgetRecord):
            jobs.pop(record.job, None)
        elif (history := jobs.get(record.job)) is not None:
            _apply(history, record)
    return sorted(jobs.values(), key=lambda h: h.submit.seq)


def _apply(history: History, record: AdmissionRecord | CheckpointRecord | ArtifactRecord | TerminalRecord) -> None:
    if isinstance(record, AdmissionRecord):
        history.admission = record
    elif isinstance(record, CheckpointRecord):
        history.checkpoint = record
    elif isinstance(record, ArtifactRecord):
        history.artifacts[record.artifact.index] = record.artifact
    elif history.terminal is None:
        history.terminal = record
