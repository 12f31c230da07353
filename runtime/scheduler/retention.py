"""Ended jobs: how long their records and files are kept, and how they go, oldest first.

A job's files are deleted before its record: after a crash in between, the record is there to try again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from safelight.runtime import messages as m
from safelight.runtime.scheduler.jobs import Ended
from safelight.runtime.scheduler.records import ForgetRecord
from safelight.runtime.scheduler.state import State


@dataclass(frozen=True, slots=True)
class _Answer:
    s: State
    job: str
    identities: tuple[bytes, ...]

    def __call__(self) -> None:
        for identity in self.identities:
            self.s.to_client(identity, m.Forgotten(self.job))


def keep(s: State, ended: Ended) -> None:
    """A job has ended: clients may ask for it until it is forgotten."""
    at = ended.terminal.at or ended.info.created_at
    expires_at = at + s.config.artifact_ttl_s if s.config.artifact_ttl_s is not None else None
    info = msgspec.structs.replace(ended.info, ended_at=at, expires_at=expires_at)
    kept = Ended(ended.seq, ended.body_sha256, ended.opening, ended.terminal, info)
    s.ended[ended.opening.job] = kept
    s.stored_bytes += kept.nbytes


def forget(s: State, job: str, identities: Sequence[bytes] = ()) -> None:
    """Deletes the files and the record of an ended job; `identities` are told when that is journalled."""
    ended = s.ended.pop(job)
    s.stored_bytes -= ended.nbytes
    for artifact in ended.terminal.artifacts:
        for path in (artifact.path, artifact.frames_path):
            if path:
                s.delete_file(path)
    s.journal(ForgetRecord(job), _Answer(s, job, tuple(identities)))


def sweep(s: State) -> None:
    """Forgets what is too old, and the oldest while there are too many jobs or bytes."""
    c = s.config
    while s.ended:
        job, oldest = next(iter(s.ended.items()))
        too_old = oldest.info.expires_at is not None and oldest.info.expires_at <= s.now
        too_many = len(s.ended) > c.keep_ended
        too_large = c.artifact_quota_bytes is not None and s.stored_bytes > c.artifact_quota_bytes
        if not (too_old or too_many or too_large):
            return
        forget(s, job)
