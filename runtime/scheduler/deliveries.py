"""The output process: its restarts, slots that come back, files that are safe."""

from __future__ import annotations

from functools import partial
from itertools import islice

from safelight.runtime import messages as m
from safelight.runtime.scheduler import lifecycle, planning
from safelight.runtime.scheduler.events import SendOutput
from safelight.runtime.scheduler.jobs import Cursor, Job, Run, Stage
from safelight.runtime.scheduler.records import ArtifactRecord
from safelight.runtime.scheduler.state import State

PUBLISHED_AGAIN = 1000  # ended jobs that a new output process is told of


def said(s: State, message: m.FromOutput) -> None:
    if isinstance(message, m.OutputHello):
        _hello(s, message)
    elif isinstance(message, m.OutputReady):
        if message.instance == s.output.instance and message.scheduler_epoch == s.epoch and not s.output.ready:
            _resume(s)
    elif isinstance(message, m.SlotReleased):
        s.slots.released(message)
    elif isinstance(message, m.OutputDropped):
        s.slots.output_let_go(message.job, message.attempt)
    elif isinstance(message, m.ArtifactCommitted):
        run = _current(s, message.job, message.attempt, message.artifact.index, message.take)
        if run is not None and run.planned.stage == Stage.SAVE:
            run.job.artifacts[message.artifact.index] = message.artifact
            s.journal(ArtifactRecord(message.job, message.artifact), partial(_saved, s, run.job, run))
    elif _current(s, message.job, message.attempt, message.index, message.take) is not None:
        lifecycle.end(s, s.jobs[message.job], m.Status.FAILED, message.error)


def _hello(s: State, message: m.OutputHello) -> None:
    s.output.heard_at = s.now
    if message.instance != s.output.instance or not s.output.ready:
        s.output.instance, s.output.ready = message.instance, False
        s.actions.append(SendOutput(m.OutputReset(s.epoch)))


def _current(s: State, job: str, attempt: int, index: int, take: int) -> Run | None:
    """The attempt that is making this output, unless its file is known already."""
    known = s.jobs.get(job)
    run = known.run if known is not None else None
    if run is None or (run.attempt, run.planned.index, run.take) != (attempt, index, take):
        return None
    return run if index not in run.job.artifacts else None


def _saved(s: State, job: Job, run: Run) -> None:
    """A file is journalled: on to the next output, or the end."""
    if job.terminal is not None:
        return
    index = job.next_index
    if index >= job.profile.outputs:
        lifecycle.end(s, job, m.Status.COMPLETED)
    elif job.run is run:
        s.groups[run.group].control.append(m.Release(*run.key, run.planned.index))
        run.planned = run.done = Cursor(index, Stage.PREPARE)
        run.take += 1
        run.take_open = False
        run.resume = None
        s.admit_due = True


def _resume(s: State) -> None:
    """A new output process, or the old one after a reset: it is told all it needs; decoding starts again."""
    s.output.ready = True
    plans = [o.plan for g in s.groups.values() for o in g.outstanding]
    s.slots.output_reset({op.slot for p in plans for op in p.ops if isinstance(op, m.Decode)})
    for ended in reversed(list(islice(reversed(s.ended.values()), PUBLISHED_AGAIN))):
        s.to_output(ended.opening)
        lifecycle.publish(s, ended.terminal)
    for job in s.jobs.values():
        if job.accepted:
            s.to_output(job.opening)
            job.told_position = -1
        if job.run is not None and job.run.take_open and job.run.planned.index not in job.artifacts:
            _decode_again(s, job.run)


def _decode_again(s: State, run: Run) -> None:
    start = Cursor(run.planned.index, Stage.DECODE)
    if run.planned.stage >= Stage.DECODE:
        run.planned = start
    if run.done.stage >= Stage.DECODE:
        run.done = start
    run.take += 1
    planning.open_take(s, run)
