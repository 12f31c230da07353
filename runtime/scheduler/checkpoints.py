"""Checkpoints: only journalled ones exist, and only those of the living attempt are taken."""

from __future__ import annotations

from functools import partial

from safelight.runtime import messages as m
from safelight.runtime.scheduler.jobs import Job
from safelight.runtime.scheduler.records import CheckpointRecord
from safelight.runtime.scheduler.state import State


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
    """The newest checkpoint replaces the one before; a later attempt may still be reading that. What a job has left at
    its end is deleted when the terminal is journalled, not before: a crash in between resumes from it."""
    old = job.checkpoint
    job.checkpoint = record
    if old is not None and job.run is not None and job.attempt == record.attempt and old.ref.path != record.ref.path:
        s.delete_file(old.ref.path)


def forget(s: State, job: Job, index: int) -> None:
    """The output has its file."""
    if job.checkpoint is not None and job.checkpoint.index == index:
        s.delete_file(job.checkpoint.ref.path)
        job.checkpoint = None
