"""Checkpoints: only journalled ones exist, and only those of the living attempt are taken."""

from __future__ import annotations

from functools import partial

from safelight.runtime import messages as m
from safelight.runtime.scheduler.jobs import Job, Stage
from safelight.runtime.scheduler.records import CheckpointRecord
from safelight.runtime.scheduler.state import Group, State


def said(s: State, message: m.CheckpointCommitted | m.CheckpointFailed) -> None:
    s.saving.discard((message.job, message.attempt))
    if isinstance(message, m.CheckpointFailed):
        return
    job = s.jobs.get(message.job)
    old = job.checkpoint if job is not None else None
    ref = message.ref
    fresh = old is None or (old.index, old.ref.step) < (message.index, ref.step)
    if job is not None and job.run is not None and job.attempt == message.attempt and fresh and job.terminal is None:
        record = CheckpointRecord(message.job, message.attempt, message.index, ref)
        s.journal(record, partial(_journalled, s, job, record))
    elif old is None or old.ref.path != ref.path:
        s.delete_file(ref.path)


def _journalled(s: State, job: Job, record: CheckpointRecord) -> None:
    """The newest checkpoint replaces the one before, unless a rank may yet resume from that."""
    old, run = job.checkpoint, job.run
    job.checkpoint = record
    if old is None or old.ref.path == record.ref.path:
        return
    if run is not None and run.attempt == record.attempt and run.done.stage > Stage.PREPARE:
        s.delete_file(old.ref.path)
    else:
        job.leftover.append(old.ref.path)


def job_ended(s: State, job: Job) -> None:
    """The terminal is on disk, so nothing resumes any more, except plans that are on their way to ranks: until those
    dropped the attempt, the files stay."""
    key = (job.id, job.attempt)
    paths = [*job.leftover, job.checkpoint.ref.path] if job.checkpoint is not None else job.leftover
    g = s.groups.get(job.home) if job.home is not None else None
    if g is not None and g.alive and (not g.settled or g.memory.holds(key)):
        s.leftovers[key] = (g.id, paths)
    else:
        _delete(s, paths)


def delete_unread(s: State, g: Group) -> None:
    """Called when ranks dropped attempts, or showed what they hold, or died."""
    for key, (home, paths) in list(s.leftovers.items()):
        if home == g.id and not g.memory.holds(key):
            del s.leftovers[key]
            _delete(s, paths)


def _delete(s: State, paths: list[str]) -> None:
    for path in paths:
        s.delete_file(path)
