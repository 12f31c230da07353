"""The request scheduler's core: events and a clock value in, actions out. Pure: no I/O, no clock, no torch.

The order of events decides everything, so a run can be replayed, simulated at scale and tested over random histories.
See docs/architecture.md for the rules; the modules beside this one hold them: submissions (clients), lifecycle (a
job's turns), planning (plans), fleet (groups), deliveries (output), checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from safelight.runtime import messages as m
from safelight.runtime.errors import SafelightError
from safelight.runtime.scheduler import deliveries, fleet, lifecycle, planning, retention, submissions
from safelight.runtime.scheduler.events import (
    Action,
    ClientSaid,
    CoreEvent,
    JournalCommitted,
    OutputSaid,
    OutputUnreachable,
    RankSaid,
    RankUnreachable,
    SupervisorSaid,
    Tick,
)
from safelight.runtime.scheduler.jobs import Ended, Job, Run, Stage
from safelight.runtime.scheduler.records import History, TerminalRecord
from safelight.runtime.scheduler.state import CoreConfig, State

RECOVERY_S = 15.0  # how long a group of an earlier scheduler may take to show itself
SAVING_S = 5.0  # for the checkpoints, beside the plans that are under way when the grace ends


class SchedulerCore:
    """One scheduler process's decisions. `epoch` was raised in the journal before; `histories` is what it holds."""

    def __init__(self, config: CoreConfig, epoch: int, histories: Sequence[History] = (), now: float = 0.0) -> None:
        self.state = State(config, epoch, now)
        self._recovered_at = now
        if epoch > 1:
            self.state.unsettled = set(self.state.groups)
        ended = [h for h in histories if h.terminal is not None]
        for history in sorted(ended, key=lambda h: h.terminal.at if h.terminal is not None else 0.0):
            _recover_ended(self.state, history)
        for history in histories:
            if history.terminal is None:
                _recover(self.state, history)
        retention.sweep(self.state)

    def handle(self, event: CoreEvent, now: float) -> list[Action]:
        """Everything that follows from one event, in the order in which it has to be carried out."""
        s = self.state
        s.now = max(s.now, now)
        self._dispatch(event)
        lifecycle.admit(s)
        for group in s.groups.values():
            planning.plan(s, group)
        lifecycle.admit(s)  # planning may have made room
        if s.draining:
            self._drain()
        actions, s.actions = s.actions, []
        return actions

    def _dispatch(self, event: CoreEvent) -> None:
        s = self.state
        if isinstance(event, RankSaid):
            fleet.rank_said(s, event.message)
        elif isinstance(event, OutputSaid):
            deliveries.said(s, event.message)
        elif isinstance(event, JournalCommitted):
            s.committed(event.token)
        elif isinstance(event, ClientSaid):
            submissions.said(s, event.identity, event.message)
        elif isinstance(event, Tick):
            self._tick()
        elif isinstance(event, SupervisorSaid):
            self._supervisor_said(event.message)
        elif isinstance(event, RankUnreachable):
            fleet.rank_unreachable(s, event.group, event.rank, event.group_epoch)
        elif isinstance(event, OutputUnreachable):
            s.output.ready = False

    def _supervisor_said(self, message: m.ToControlled) -> None:
        s = self.state
        if isinstance(message, m.Drain):
            s.draining, s.drain_until = True, s.now + message.grace_s
        elif not isinstance(message, m.Shutdown):  # which ends the process: main.py
            fleet.supervisor_said(s, message)

    def _tick(self) -> None:
        s = self.state
        submissions.expire(s)
        retention.sweep(s)
        fleet.watch(s)
        if s.awaiting and s.now > self._recovered_at + RECOVERY_S:
            for group in list(s.awaiting):
                fleet.release_awaiting(s, group)
        s.admit_due = True
        submissions.tell_positions(s)

    def _drain(self) -> None:
        s = self.state
        if s.now >= s.drain_until and not s.stopped:
            _stop(s)
        over = not s.jobs or (s.stopped and (not s.saving or s.now > s.saving_until))
        if over and s.journal_idle and not s.drained:
            s.drained = True
            s.to_supervisor(m.Drained())


def _stop(s: State) -> None:
    """The grace is over: attached jobs end, detached ones are saved where they stand and go on at the next start."""
    s.stopped = True
    under_way = max((sum(o.predicted_ms for o in g.outstanding) for g in s.groups.values()), default=0.0)
    s.saving_until = s.now + SAVING_S + 2 * under_way / 1000
    for job in list(s.jobs.values()):
        run = job.run
        if job.attached:
            lifecycle.end(s, job, m.Status.CANCELLED, m.ErrorInfo("cancelled", "the server was shut down"))
        elif run is not None and job.profile.resumable and (step := _steps_planned(run)) > 0:
            s.groups[run.group].control.append(m.Checkpoint(*run.key, run.planned.index, step))
            s.saving.add(run.key)
    for group in s.groups.values():
        planning.plan(s, group)


def _steps_planned(run: Run) -> int:
    """Steps that the state of the current output has done when every plan sent is done; 0 before it is there."""
    if run.planned.stage == Stage.DENOISE:
        return run.planned.k
    return run.job.profile.steps if run.planned.stage > Stage.DENOISE else 0


def _recover_ended(s: State, history: History) -> None:
    submit, terminal = history.submit, history.terminal
    assert terminal is not None
    s.next_seq = max(s.next_seq, submit.seq + 1)
    r = submit.request
    opening = m.OpenJob(submit.job, submit.owner, r.media, r.fps, r.num_frames, r.height, r.width, r.num_outputs)
    info = m.JobInfo(
        submit.origin, r.prompt, r.height, r.width, r.num_frames, r.fps, r.num_inference_steps, r.seed,
        r.num_outputs, submit.accepted_at,
    )  # fmt: skip
    retention.keep(s, Ended(submit.seq, submit.body_sha256, opening, terminal, info))
    lifecycle.publish(s, terminal)


def _recover(s: State, history: History) -> None:
    """One job of the journal that has not ended: waiting for the group that had it, or waiting."""
    submit, admission = history.submit, history.admission
    s.next_seq = max(s.next_seq, submit.seq + 1)
    r = submit.request
    try:
        profile = s.config.profile_of(r)
    except SafelightError as error:  # accepted under another model
        info = m.ErrorInfo(error.code, error.message, error.param)
        failed = TerminalRecord(submit.job, m.Status.FAILED, (), info, s.now)
        s.journal(failed, partial(_recover_ended, s, replace(history, terminal=failed)))
        return
    job = Job(
        submit.job, submit.owner, submit.seq, submit.body_sha256, r, profile, submit.attached, submit.priority,
        submit.accepted_at, submit.deadline_at, s.now + submissions.LEASE_S, accepted=True,
        checkpoint=history.checkpoint, artifacts=dict(history.artifacts), origin=submit.origin,
    )  # fmt: skip
    s.jobs[job.id] = job
    submissions.watch(s, job)
    if job.next_index >= profile.outputs:
        lifecycle.end(s, job, m.Status.COMPLETED)
    elif admission is None:
        lifecycle.enqueue(s, job)
    else:
        job.attempt, job.requeued = admission.attempt, True
        job.home, job.home_epoch = admission.group, admission.group_epoch
        job.suspect_until, job.alone_deaths = admission.suspect_until, admission.alone_deaths
        s.awaiting.setdefault(admission.group, []).append(job)
