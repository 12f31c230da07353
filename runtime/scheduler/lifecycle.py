"""The turns in a job's life: it waits, enters a group, leaves it, ends. Every end of a job passes through `end`."""

from __future__ import annotations

from functools import partial

from safelight.runtime import messages as m
from safelight.runtime.scheduler import checkpoints, placement, retention
from safelight.runtime.scheduler.admission import too_large, view
from safelight.runtime.scheduler.jobs import Cursor, Ended, Job, Run, Stage
from safelight.runtime.scheduler.policy import JobView
from safelight.runtime.scheduler.records import AdmissionRecord, TerminalRecord
from safelight.runtime.scheduler.state import Group, State

MAX_RESIDENT = 16
MAX_PASSED_OVER = 8
MAX_ALONE_DEATHS = 2


def remaining_ms(s: State, job: Job) -> float:
    """Predicted work that is left of a job: where it runs, or anywhere."""
    return placement.work_ms(s, job, job.run.group if job.run else None)


def running_ms(s: State) -> float:
    """Predicted work that is left of what is in the groups."""
    return sum(remaining_ms(s, r.job) for g in s.groups.values() for r in g.residents.values())


def backlog_ms(s: State) -> float:
    """Predicted work of everything accepted."""
    return running_ms(s) + s.queue.work_ms + sum(j.queued_ms for j in s.suspects)


def eta_ms(s: State, job: Job) -> float:
    """Predicted time until the end: the job's own work where it runs; before that, also what was accepted earlier."""
    if job.run is not None:
        return remaining_ms(s, job)
    before = sum(j.queued_ms for j in s.jobs.values() if j.run is None and j.seq < job.seq)
    return shared_ms(s, running_ms(s) + before) + remaining_ms(s, job)


def shared_ms(s: State, work_ms: float) -> float:
    """How long all groups together take for some work."""
    return work_ms / max(1, sum(g.alive for g in s.groups.values()))


def run_view(s: State, run: Run) -> JobView:
    return view(run.job, remaining_ms(s, run.job))


def enqueue(s: State, job: Job) -> None:
    """The job waits for a group; a suspect waits for one of its own."""
    job.queued_ms = remaining_ms(s, job)
    job.passed_over = 0
    if job.suspect_until is not None:
        s.suspects.append(job)
    else:
        s.queue.push(job)
    s.admit_due = True


def dequeue(s: State, job: Job) -> None:
    """Inverse of `enqueue`, wherever the job waits."""
    s.queue.remove(job)
    if job in s.suspects:
        s.suspects.remove(job)
    for waiting in s.awaiting.values():
        if job in waiting:
            waiting.remove(job)


# --------------------------------------------------------------------------------------------------------------------
# Into a group


def admit(s: State) -> None:
    """Lets jobs into groups, each into the one that will finish it first, until none may enter."""
    if not s.admit_due:
        return
    s.admit_due = False
    while not s.stopped and (len(s.queue) or s.suspects):
        groups = [g for g in s.groups.values() if g.usable]
        if len(groups) > 1:
            groups.sort(key=lambda g: sum(remaining_ms(s, r.job) for r in g.residents.values()))
        choices = [placement.choose(s, groups, lane) for lane in range(len(s.config.policy.lanes))]
        if not any(_admit_one(s, g, choices) for g in groups):
            return


def _admit_one(s: State, g: Group, choices: list[dict[int, Job]]) -> bool:
    residents = g.residents.values()
    if len(residents) >= MAX_RESIDENT or any(r.job.suspect_until is not None for r in residents):
        return False
    if (suspect := _suspect_for(s, g)) is not None:
        return not residents and _enter_or_refuse(s, g, suspect)
    lanes = s.config.policy.lanes
    heads = {lane: head for lane in range(len(lanes)) if (head := s.queue.head(lane)) is not None}
    stuck = {lane: head for lane, head in heads.items() if head.passed_over >= MAX_PASSED_OVER}
    chosen = {lane: choice[g.id] for lane, choice in enumerate(choices) if g.id in choice}
    first = s.config.policy.turn(g.lane_ms)
    for lane, head in sorted((stuck or chosen).items(), key=lambda item: item[0] != first):
        if _wanted(s, g, lane, head) and _enter_or_refuse(s, g, head):
            for other in heads.values():
                other.passed_over += other is not head and not _fits(s, g, other)
            return True
    return False


def _suspect_for(s: State, g: Group) -> Job | None:
    """A suspect waits for the group where it died to be empty, or enters another that is."""
    for job in s.suspects:
        home = s.groups.get(job.home if job.home is not None else g.id)
        if not g.residents or home is g or home is None or home.phase == "given up":
            return job
    return None


def _wanted(s: State, g: Group, lane: int, job: Job) -> bool:
    """A group that has work takes in only jobs that would go before all of it."""
    busy = [r for r in g.residents.values() if r.busy]
    if len(busy) < placement.TARGET_BUSY:
        return True
    key = s.config.policy.lanes[lane].key
    return key(view(job, job.queued_ms)) < min(key(run_view(s, r)) for r in busy)


def _fits(s: State, g: Group, job: Job) -> bool:
    return g.memory.fits(job.profile.held_bytes, s.peaks.peak(job.profile, g.memory.encode_bytes))


def _enter_or_refuse(s: State, g: Group, job: Job) -> bool:
    """False when the job has to wait for memory."""
    if _fits(s, g, job):
        enter(s, g, job)
        return True
    if (error := never_fits(s, job)) is not None:
        end(s, job, m.Status.FAILED, error)
        return True
    return False


def never_fits(s: State, job: Job) -> m.ErrorInfo | None:
    """The refusal of a job that no group can ever hold; None while a group's memory is still unknown."""
    groups = [g for g in s.groups.values() if g.phase != "given up"]
    if not groups or not all(g.budget_known for g in groups):
        return None
    return too_large(job.profile, s.peaks, [g.memory for g in groups])


def enter(s: State, g: Group, job: Job) -> None:
    """Starts the next attempt of a job in a group; its first op follows the journal's commit."""
    dequeue(s, job)
    job.attempt += 1
    index = job.next_index
    start = Cursor(index, Stage.ENCODE)
    run = Run(job, g.id, job.attempt, start, start, first_take(s), s.now, job.resume_ref(index))
    place(s, g, run)
    record = AdmissionRecord(job.id, job.attempt, g.id, g.epoch, job.suspect_until, job.alone_deaths)
    s.journal(record, partial(_admitted, run))


def place(s: State, g: Group, run: Run) -> None:
    """The attempt counts as a resident of the group from now on."""
    run.job.run, run.job.home, run.job.home_epoch = run, g.id, g.epoch
    g.residents[run.job.id] = run
    peak = s.peaks.peak(run.job.profile, g.memory.encode_bytes)
    g.memory.take(run.key, run.job.profile.held_bytes, peak)


def first_take(s: State) -> int:
    """Takes of a new scheduler are above all of the one before: chunks of those may still be on their way."""
    return (s.epoch - 1) << 20


def _admitted(run: Run) -> None:
    run.admitted = True


# --------------------------------------------------------------------------------------------------------------------
# Out of a group


def leave(s: State, run: Run, *, aborted: bool) -> None:
    """Ends an attempt whose group lives on: the next plan carries its Drop."""
    g = s.groups[run.group]
    del g.residents[run.job.id]
    run.job.run = None
    if run.admitted:
        g.control.append(m.Drop(*run.key))
    else:
        g.memory.give_back(run.key)
    _close_output(s, run, aborted=aborted)
    s.admit_due = True


def lose(s: State, g: Group) -> None:
    """The group died: its jobs start again elsewhere or later, those in unacknowledged plans as suspects."""
    suspects = {job for o in g.outstanding for op in o.plan.ops for job in computing(op)}
    residents = list(g.residents.values())
    g.dying += g.memory.attempts()
    g.residents.clear()
    g.outstanding.clear()
    g.control.clear()
    g.memory.clear()
    g.settled = False
    checkpoints.delete_unread(s, g)
    for run in residents:
        run.job.run = None
        _close_output(s, run, aborted=True)
        _survive(s, run, suspect=run.job.id in suspects)
    s.admit_due = True


def computing(op: m.Op) -> tuple[str, ...]:
    """The jobs that an op computes for; bookkeeping ops name none."""
    if isinstance(op, m.Denoise):
        return tuple(u.job for u in op.units)
    return (op.job,) if isinstance(op, m.Encode | m.Prepare | m.Decode) else ()


def _survive(s: State, run: Run, *, suspect: bool) -> None:
    job = run.job
    job.requeued = True
    if suspect:
        job.alone_deaths += job.suspect_until is not None
        job.suspect_until = max(job.suspect_until or 0, run.planned.progress(job.profile))
    if job.alone_deaths >= MAX_ALONE_DEATHS:
        message = f"the job ended its worker {MAX_ALONE_DEATHS} times while it ran alone; it will not be tried again"
        end(s, job, m.Status.FAILED, m.ErrorInfo("poisoned", message))
    elif job.terminal is None:
        enqueue(s, job)


def _close_output(s: State, run: Run, *, aborted: bool) -> None:
    s.slots.close(*run.key)
    if (aborted and run.take_open) or s.slots.holds(*run.key):
        s.to_output(m.DropOutput(*run.key))


# --------------------------------------------------------------------------------------------------------------------
# The end


def end(s: State, job: Job, status: m.Status, error: m.ErrorInfo | None = None) -> None:
    """Decides the terminal of a job, once; clients learn of it when it is journalled."""
    if job.terminal is not None:
        return
    artifacts = tuple(job.artifacts[i] for i in sorted(job.artifacts)) if status == m.Status.COMPLETED else ()
    job.terminal = TerminalRecord(job.id, status, artifacts, error, s.now)
    dequeue(s, job)
    if job.run is not None:
        leave(s, job.run, aborted=status != m.Status.COMPLETED)
    s.journal(job.terminal, partial(_ended, s, job))


def _ended(s: State, job: Job) -> None:
    assert job.terminal is not None
    del s.jobs[job.id]
    retention.keep(s, Ended(job.seq, job.body_sha256, job.opening, job.terminal, job.info))
    publish(s, job.terminal)
    for identity in job.cancellers:
        s.to_client(identity, m.CancelAccepted(job.id))
    checkpoints.job_ended(s, job)
    if job.forgetters:
        retention.forget(s, job.id, job.forgetters)
    retention.sweep(s)


def publish(s: State, t: TerminalRecord) -> None:
    s.to_output(m.Publish(t.job, t.status, t.artifacts, t.error))
