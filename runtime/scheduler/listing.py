"""What clients are told of jobs: the state of one, a page of many."""

from __future__ import annotations

from safelight.runtime import messages as m
from safelight.runtime.scheduler import lifecycle
from safelight.runtime.scheduler.jobs import WIRE_STAGE, Cursor, Ended, Job, Stage
from safelight.runtime.scheduler.state import State

MAX_PAGE = 100


def state_of(s: State, job_id: str, owner: str) -> m.JobState | None:
    """None when this owner has no such job."""
    job, ended = s.jobs.get(job_id), s.ended.get(job_id)
    if job is not None and job.owner == owner:
        return _living(s, job)
    if ended is not None and ended.opening.owner == owner:
        return _ended(ended)
    return None


def page(s: State, query: m.ListJobs) -> m.JobPage | None:
    """None when `after` is no job of this owner and origin."""
    found: list[Job | Ended] = [j for j in s.jobs.values() if j.owner == query.owner and j.origin == query.origin]
    found += [e for e in s.ended.values() if e.opening.owner == query.owner and e.info.origin == query.origin]
    found.sort(key=lambda entry: entry.seq, reverse=query.descending)
    start = 0
    if query.after is not None:
        ids = [entry.id if isinstance(entry, Job) else entry.opening.job for entry in found]
        if query.after not in ids:
            return None
        start = ids.index(query.after) + 1
    end = start + max(1, min(query.limit, MAX_PAGE))
    states = tuple(_living(s, e) if isinstance(e, Job) else _ended(e) for e in found[start:end])
    return m.JobPage(query.ask, states, len(found) > end)


def _ended(ended: Ended) -> m.JobState:
    t = ended.terminal
    progress = 1.0 if t.status == m.Status.COMPLETED else 0.0
    return m.JobState(ended.opening.job, m.Stage.SAVING, t.status, t.artifacts, t.error, ended.info, progress)


def _living(s: State, job: Job) -> m.JobState:
    at = job.run.done if job.run is not None else Cursor(job.next_index, Stage.ENCODE)
    whole = Cursor(job.profile.outputs, Stage.ENCODE).progress(job.profile)
    stage = WIRE_STAGE[at.stage] if job.run is not None else m.Stage.QUEUED
    ahead = 0 if job.run is not None else sum(other.run is None and other.seq < job.seq for other in s.jobs.values())
    eta = lifecycle.eta_ms(s, job)
    artifacts = tuple(job.artifacts[i] for i in sorted(job.artifacts))
    progress = min(0.99, at.progress(job.profile) / whole)
    return m.JobState(job.id, stage, None, artifacts, None, job.info, progress, ahead, eta)
