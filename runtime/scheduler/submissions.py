"""What clients say: submit, cancel, renew, ask. A reply that promises something follows the journal's commit."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from itertools import islice

import msgspec

from safelight.runtime import messages as m
from safelight.runtime.errors import SafelightError
from safelight.runtime.scheduler import lifecycle, listing, retention
from safelight.runtime.scheduler.jobs import Ended, Job
from safelight.runtime.scheduler.records import SubmitRecord
from safelight.runtime.scheduler.state import State

LEASE_S = 10.0
POSITIONS_TOLD = 100  # of the queue; those behind are told when they come so far
MAX_RETRY_AFTER_S = 110.0  # the OpenAI SDK gives up above 120


def said(s: State, identity: bytes, message: m.ToScheduler) -> None:
    if isinstance(message, m.Submit):
        error = _submit(s, identity, message)
        if error is not None:
            s.to_client(identity, m.Refused(message.job, error))
    elif isinstance(message, m.Cancel):
        _cancel(s, identity, message)
    elif isinstance(message, m.Forget):
        _forget(s, identity, message)
    elif isinstance(message, m.RenewLease):
        for job in filter(None, map(s.jobs.get, message.jobs)):
            if job.owner == message.owner:
                job.lease_until = s.now + LEASE_S
    elif isinstance(message, m.QueryJob):
        s.to_client(identity, listing.state_of(s, message.job, message.owner) or _unknown(message.job))
    elif isinstance(message, m.ListJobs):
        page = listing.page(s, message)
        s.to_client(identity, page or m.Refused(message.ask, _not_found(message.after or "")))
    else:
        s.to_client(identity, server_status(s))


def _submit(s: State, identity: bytes, message: m.Submit) -> m.ErrorInfo | None:
    """The refusal, or None when the job is on its way to being accepted."""
    body = hashlib.sha256(
        msgspec.msgpack.encode((message.request, message.attached, message.priority, message.deadline_s))
    ).digest()
    known: Job | Ended | None = s.jobs.get(message.job) or s.ended.get(message.job)
    if known is not None:
        return _submit_again(s, identity, message, body, known)
    if s.draining:
        return m.ErrorInfo("overloaded", "the server is shutting down and takes no new jobs; try again after its start")
    if all(g.phase == "given up" for g in s.groups.values()):
        return m.ErrorInfo("worker_lost", "no worker group is left; see the server's log and start it again")
    if waiting(s) >= s.config.max_queue:
        return _overloaded(s)
    job = _new_job(s, message, body)
    if isinstance(job, m.ErrorInfo):
        return job
    if (error := lifecycle.never_fits(s, job)) is not None:
        return error
    s.next_seq += 1
    s.jobs[job.id] = job
    job.submitters.append((identity, False))
    record = SubmitRecord(
        job.id, job.owner, job.seq, body, job.request, job.attached, job.priority, job.accepted_at, job.deadline_at,
        job.origin,
    )  # fmt: skip
    s.journal(record, partial(_accepted, s, job))
    watch(s, job)
    return None


def _new_job(s: State, message: m.Submit, body: bytes) -> Job | m.ErrorInfo:
    if not s.config.job_id.fullmatch(message.job):
        return m.ErrorInfo("invalid_request", f"job id expected as a ULID, got {message.job[:80]!r}", param="job")
    if message.deadline_s is not None and not 0 < message.deadline_s < math.inf:
        error = f"deadline_s expected as a positive number of seconds, got {message.deadline_s}"
        return m.ErrorInfo("invalid_request", error, param="deadline_s")
    try:
        profile = s.config.profile_of(message.request)
    except SafelightError as error:
        return m.ErrorInfo(error.code, error.message, error.param)
    if s.config.slot_count < 1 or profile.chunk_bytes > s.config.slot_bytes:
        return m.ErrorInfo(
            "too_large",
            f"one decoded chunk of this request has {profile.chunk_bytes} bytes and a frame slot "
            f"{s.config.slot_bytes}: ask for a smaller size, or start the server with larger slots",
        )
    deadline_at = s.now + message.deadline_s if message.deadline_s is not None else None
    return Job(
        message.job, message.owner, s.next_seq, body, message.request, profile, message.attached, message.priority,
        s.now, deadline_at, s.now + LEASE_S, origin=message.origin,
    )  # fmt: skip


def _submit_again(s: State, identity: bytes, message: m.Submit, body: bytes, known: Job | Ended) -> m.ErrorInfo | None:
    owner = known.owner if isinstance(known, Job) else known.opening.owner
    if owner != message.owner or known.body_sha256 != body:
        return m.ErrorInfo("conflict", f"job {message.job} exists with another body; use a new id", param="job")
    if isinstance(known, Job) and not known.accepted:
        known.submitters.append((identity, True))
    else:
        s.to_client(identity, m.Accepted(message.job, existing=True))
    return None


def _accepted(s: State, job: Job) -> None:
    job.accepted = True
    position = waiting(s) - 1
    predicted = lifecycle.shared_ms(s, lifecycle.backlog_ms(s)) + lifecycle.remaining_ms(s, job)
    for identity, existing in job.submitters:
        s.to_client(identity, m.Accepted(job.id, existing, position, predicted))
    job.submitters.clear()
    s.to_output(job.opening)
    if job.terminal is None:
        job.told_position = position
        s.to_output(m.Progress(job.id, m.Stage.QUEUED, position=position, eta_ms=predicted))
        lifecycle.enqueue(s, job)


def tell_positions(s: State) -> None:
    """The first in the queue are told when they moved."""
    queued = (job for job in s.jobs.values() if job.run is None and job.accepted and job.terminal is None)
    before = lifecycle.running_ms(s)
    for position, job in enumerate(islice(queued, POSITIONS_TOLD)):
        if position != job.told_position:
            job.told_position = position
            eta = lifecycle.shared_ms(s, before) + lifecycle.remaining_ms(s, job)
            s.to_output(m.Progress(job.id, m.Stage.QUEUED, position=position, eta_ms=eta))
        before += job.queued_ms


def waiting(s: State) -> int:
    """Jobs that are in no group."""
    return len(s.jobs) - sum(len(g.residents) for g in s.groups.values())


def _overloaded(s: State) -> m.ErrorInfo:
    """Asks to come back when a quarter of the work should be gone."""
    seconds = lifecycle.backlog_ms(s) / 1000 / max(1, sum(g.usable for g in s.groups.values()))
    retry = min(MAX_RETRY_AFTER_S, max(1.0, seconds / 4))
    message = f"the queue is full ({s.config.max_queue} jobs wait); try again in {retry:.0f} s"
    return m.ErrorInfo("overloaded", message, retry_after_s=retry)


def _cancel(s: State, identity: bytes, message: m.Cancel) -> None:
    job, ended = s.jobs.get(message.job), s.ended.get(message.job)
    if job is not None and job.owner == message.owner:
        job.cancellers.append(identity)
        lifecycle.end(s, job, m.Status.CANCELLED, m.ErrorInfo("cancelled", message.reason))
    elif ended is not None and ended.opening.owner == message.owner:
        s.to_client(identity, m.CancelAccepted(message.job))
    else:
        s.to_client(identity, _unknown(message.job))


def _forget(s: State, identity: bytes, message: m.Forget) -> None:
    job, ended = s.jobs.get(message.job), s.ended.get(message.job)
    if job is not None and job.owner == message.owner:
        job.forgetters.append(identity)
        lifecycle.end(s, job, m.Status.CANCELLED, m.ErrorInfo("cancelled", "deleted by the client"))
    elif ended is not None and ended.opening.owner == message.owner:
        retention.forget(s, message.job, [identity])
    else:
        s.to_client(identity, _unknown(message.job))


def _unknown(job: str) -> m.Refused:
    return m.Refused(job, _not_found(job))


def _not_found(job: str) -> m.ErrorInfo:
    return m.ErrorInfo("not_found", f"there is no job {job[:80]!r} of this owner")


def server_status(s: State) -> m.ServerStatus:
    groups = tuple(
        m.GroupState(
            g.id, g.epoch, g.phase, sum(r.ready is not None for r in g.ranks.values()), g.world_size,
            max((s.now - r.heard_at for r in g.ranks.values() if r.heard), default=0.0), g.busy_ms,
        )
        for g in s.groups.values()
    )  # fmt: skip
    queued = waiting(s)
    ready = s.output.ready and any(g.usable for g in s.groups.values()) and not s.draining
    return m.ServerStatus(
        ready, s.draining, groups, s.output.ready, queued, len(s.jobs) - queued,
        s.now - s.output.heard_at if s.output.instance else 0.0, lifecycle.backlog_ms(s), s.stored_bytes,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Leases and deadlines


def watch(s: State, job: Job) -> None:
    """Looks at the job again when its lease or deadline may have passed."""
    times = [t for t in (job.deadline_at, job.lease_until if job.attached else None) if t is not None]
    if times:
        s.wake_at(min(times), job)


def expire(s: State) -> None:
    """Cancels what has outlived its lease or deadline."""
    while (job := s.due()) is not None:
        if job.terminal is not None:
            continue
        if job.deadline_at is not None and job.deadline_at <= s.now:
            lifecycle.end(s, job, m.Status.CANCELLED, m.ErrorInfo("cancelled", "the job's deadline has passed"))
        elif job.attached and job.lease_until <= s.now:
            error = m.ErrorInfo("cancelled", f"the client did not renew its lease for {LEASE_S:.0f} s")
            lifecycle.end(s, job, m.Status.CANCELLED, error)
        else:
            watch(s, job)
