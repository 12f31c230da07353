"""What enters and leaves the scheduler's core: events in, actions out. No I/O happens on either side of this line."""

from __future__ import annotations

from dataclasses import dataclass

from safelight.runtime import messages as m
from safelight.runtime.scheduler.records import Record


@dataclass(frozen=True, slots=True)
class ClientSaid:
    identity: bytes  # where replies go; means nothing else
    message: m.ToScheduler


@dataclass(frozen=True, slots=True)
class RankSaid:
    message: m.FromWorker


@dataclass(frozen=True, slots=True)
class OutputSaid:
    message: m.FromOutput


@dataclass(frozen=True, slots=True)
class SupervisorSaid:
    message: m.ToControlled


@dataclass(frozen=True, slots=True)
class JournalCommitted:
    """Every record up to this token is on disk."""

    token: int


@dataclass(frozen=True, slots=True)
class RankUnreachable:
    """A send to this rank had no route or would have blocked."""

    group: int
    rank: int
    group_epoch: int


@dataclass(frozen=True, slots=True)
class OutputUnreachable:
    pass


@dataclass(frozen=True, slots=True)
class Tick:
    """Comes at least once a second."""


CoreEvent = (
    ClientSaid | RankSaid | OutputSaid | SupervisorSaid | JournalCommitted | RankUnreachable | OutputUnreachable | Tick
)


@dataclass(frozen=True, slots=True)
class SendClient:
    identity: bytes
    message: m.FromScheduler


@dataclass(frozen=True, slots=True)
class SendRank:
    group: int
    rank: int
    group_epoch: int
    message: m.ToWorker


@dataclass(frozen=True, slots=True)
class SendOutput:
    message: m.ToOutput


@dataclass(frozen=True, slots=True)
class SendSupervisor:
    message: m.FromControlled


@dataclass(frozen=True, slots=True)
class JournalWrite:
    """Tokens grow by one; records are committed in the order of their tokens."""

    token: int
    record: Record


@dataclass(frozen=True, slots=True)
class DeleteFile:
    """A checkpoint that no recovery will read again, or a file of a job that is being forgotten."""

    path: str


Action = SendClient | SendRank | SendOutput | SendSupervisor | JournalWrite | DeleteFile
