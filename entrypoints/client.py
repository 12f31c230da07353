"""The native client of a running server: submit, follow, cancel. Sync, ZMQ, torch-free.

A `Client` belongs to one thread. It survives restarts of scheduler and output: what was not answered is sent again
(submits are idempotent by job id), and subscriptions are renewed every RENEW_S, which brings a snapshot each time.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Set
from types import TracebackType
from typing import Any

import zmq

from safelight.entrypoints.previews import Preview, received
from safelight.runtime import transport
from safelight.runtime.errors import JobFailed, SafelightError, WorkerLost, from_code
from safelight.runtime.messages import (
    Accepted,
    Cancel,
    CancelAccepted,
    Endpoints,
    ErrorInfo,
    Event,
    FromEvents,
    FromScheduler,
    GenerationRequest,
    JobState,
    Priority,
    QueryJob,
    QueryStatus,
    Refused,
    RenewLease,
    ServerStatus,
    Status,
    Submit,
    Subscribe,
    ToScheduler,
    Unsubscribe,
)
from safelight.runtime.ulid import new_ulid

RENEW_S = 2.0  # leases, subscriptions, and requests without an answer
ANSWER_S = 30.0  # a scheduler that restarts answers well within this


def error_of(info: ErrorInfo) -> SafelightError:
    """The typed error that an ErrorInfo describes."""
    return from_code(info.code, info.message, info.param, info.retry_after_s)


def error_of_end(event: Event) -> SafelightError:
    """Why a job did not complete."""
    return error_of(event.error) if event.error else JobFailed(f"job {event.job} ended as {event.status}")


@dataclasses.dataclass(slots=True)
class _Job:
    attached: bool
    last: Event | None = None
    place: tuple[int, int] = (-1, -1)  # of the last preview
    unread: list[Event | Preview] = dataclasses.field(default_factory=list)


class Client:
    """`with Client(endpoints) as client: job = client.submit(request); event = client.wait(job)`."""

    def __init__(self, endpoints: Endpoints, owner: str = "local") -> None:
        self._owner = owner
        self._context: zmq.Context[Any] = zmq.Context()
        self._submit: transport.Channel[FromScheduler]
        self._submit = transport.connect_dealer(self._context, endpoints.submit, FromScheduler)
        self._events: transport.Channel[FromEvents]
        self._events = transport.connect_dealer(self._context, endpoints.events, FromEvents)
        self._jobs: dict[str, _Job] = {}  # open ones; the lease thread reads it
        self._lock = threading.Lock()
        self._renewed = time.monotonic()
        self._leases = _Leases(self._context, endpoints.submit, owner, self._attached)
        self._leases.start()

    def submit(
        self,
        request: GenerationRequest,
        *,
        job: str | None = None,
        attached: bool = True,
        priority: Priority = Priority.NORMAL,
        deadline_s: float | None = None,
        timeout_s: float = ANSWER_S,
    ) -> str:
        """Subscribes to the events of a job, submits it and returns its id (a new one, unless `job` names it).

        Raises what the scheduler refused it with (InvalidRequest, TooLarge, Overloaded, Conflict, ...), or WorkerLost
        when there was no answer within `timeout_s`; submitting again with the same id is safe.
        """
        job = job or new_ulid()
        with self._lock:
            self._jobs[job] = _Job(attached)
        message = Submit(job, self._owner, request, attached, priority, deadline_s)
        self._subscribe(job)  # first, so that its earliest steps are seen, too
        try:
            self._ask(message, lambda answer: isinstance(answer, Accepted) and answer.job == job, job, timeout_s)
        except SafelightError:
            self._unfollow(job)
            raise
        return job

    def attach(self, job: str, *, renew: bool = False, timeout_s: float = ANSWER_S) -> None:
        """Follows a job that exists already; `renew` also holds its lease. Raises NotFound, or WorkerLost.

        An end of long ago comes from the scheduler: output may know it no more.
        """
        query = QueryJob(job, self._owner)
        state = self._ask(query, lambda answer: isinstance(answer, JobState) and answer.job == job, job, timeout_s)
        assert isinstance(state, JobState)
        with self._lock:
            self._jobs[job] = _Job(renew)
        if state.status is None:
            self._subscribe(job)
        else:
            self._note(Event(job, 0, status=state.status, artifacts=state.artifacts, error=state.error))

    def cancel(self, job: str, timeout_s: float = ANSWER_S) -> None:
        """Asks for the cancellation of a job; its terminal event follows. Raises NotFound, or WorkerLost."""
        message = Cancel(job, self._owner)
        self._ask(message, lambda answer: isinstance(answer, CancelAccepted) and answer.job == job, job, timeout_s)

    def status(self, timeout_s: float = ANSWER_S) -> ServerStatus:
        """Readiness and load of the server. Raises WorkerLost."""
        answer = self._ask(QueryStatus(), lambda answer: isinstance(answer, ServerStatus), "", timeout_s)
        assert isinstance(answer, ServerStatus)
        return answer

    @property
    def open_jobs(self) -> frozenset[str]:
        """Jobs whose terminal event has not been read."""
        return frozenset(self._jobs)

    def poll(self, timeout_s: float) -> list[Event | Preview]:
        """New events of all open jobs, waiting up to `timeout_s` for the first; a terminal event closes its job.
        Previews are among them for jobs that asked for some."""
        self._receive(timeout_s, self.open_jobs)
        return [event for job in self.open_jobs for event in self._read(job)]

    def events(self, job: str) -> Iterator[Event | Preview]:
        """As `poll`, of one job up to its terminal; events of other jobs are kept for their readers."""
        while job in self._jobs:
            self._receive(RENEW_S, {job})
            yield from self._read(job)

    def wait(self, job: str) -> Event:
        """The terminal event of a completed job. Raises JobFailed, Poisoned, Cancelled, ... for the others."""
        for event in self.events(job):
            if isinstance(event, Preview):
                continue
            if event.status is Status.COMPLETED:
                return event
            if event.status is not None:
                raise error_of_end(event)
        raise JobFailed(f"job {job} is not followed by this client; attach to it first")

    def close(self) -> None:
        """Stops renewing leases and closes the sockets; jobs go on until their leases run out."""
        self._leases.stop()
        self._submit.close()
        self._events.close()
        self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attached(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(job for job, entry in self._jobs.items() if entry.attached)

    def _unfollow(self, job: str) -> None:
        with self._lock:
            self._jobs.pop(job, None)
        self._events.send(Unsubscribe(job, self._owner))

    def _subscribe(self, job: str) -> None:
        # From the snapshot on, whatever was seen before: the numbers of a restarted output start again.
        self._events.send(Subscribe(job, self._owner))

    def _receive(self, timeout_s: float, wanted: Set[str]) -> None:
        """Waits up to `timeout_s` for an event of `wanted` jobs, unless one is unread already."""
        deadline = time.monotonic() + timeout_s
        while not any(self._jobs[job].unread for job in wanted):
            now = time.monotonic()
            if now - self._renewed >= RENEW_S:
                self._renewed = now
                for job in self.open_jobs:
                    self._subscribe(job)
            due = min(deadline, self._renewed + RENEW_S)
            self._events.socket.poll(max(0, round(1000 * (due - now))))
            for came in self._events.receive_all():
                if isinstance(came.message, Event):
                    self._note(came.message)
                else:
                    self._note_preview(received(came.message, came.frames))
            if time.monotonic() >= deadline:
                return

    def _note(self, event: Event) -> None:
        """Keeps news of open jobs; renewed subscriptions repeat the last event, which is no news."""
        entry = self._jobs.get(event.job)
        over = entry is not None and entry.last is not None and entry.last.status is not None
        if entry is not None and not over and event.known and event != entry.last:
            entry.last = event
            entry.unread.append(event)

    def _note_preview(self, preview: Preview | None) -> None:
        entry = self._jobs.get(preview.job) if preview is not None else None
        over = entry is not None and entry.last is not None and entry.last.status is not None
        if preview is not None and entry is not None and not over and preview.place > entry.place:
            entry.place = preview.place
            entry.unread.append(preview)

    def _read(self, job: str) -> list[Event | Preview]:
        """The job's unread events; reading its terminal closes it."""
        found, self._jobs[job].unread = self._jobs[job].unread, []
        if found and isinstance(found[-1], Event) and found[-1].status is not None:
            self._unfollow(job)
        return found

    def _ask(
        self, message: ToScheduler, answers: Callable[[FromScheduler], bool], job: str, timeout_s: float
    ) -> FromScheduler:
        """Sends until answered. Raises the error of a Refused about `job`, or WorkerLost."""
        deadline, resend = time.monotonic() + timeout_s, 0.0
        while (now := time.monotonic()) < deadline:
            if now >= resend:
                self._submit.send(message)
                resend = now + RENEW_S
            self._submit.socket.poll(max(0, round(1000 * (min(resend, deadline) - now))))
            for came in self._submit.receive_all():
                answer = came.message
                if isinstance(answer, Refused) and answer.job == job:
                    raise error_of(answer.error)
                if answers(answer):
                    return answer
        raise WorkerLost(f"no answer from the scheduler for {timeout_s:.0f} s; is the server running?")


class _Leases:
    """A thread with its own socket that renews the leases of attached jobs."""

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, owner: str, jobs: Callable[[], tuple[str, ...]]
    ) -> None:
        self._context, self._endpoint, self._owner, self._jobs = context, endpoint, owner, jobs
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        with transport.connect_dealer(self._context, self._endpoint, FromScheduler) as channel:
            while not self._stopped.wait(RENEW_S):
                for _ in channel.receive_all():
                    pass  # renewals have no answer that matters
                if jobs := self._jobs():
                    try:
                        channel.send(RenewLease(jobs, self._owner))
                    except transport.PeerUnreachable:
                        continue  # the scheduler restarts; it grants new leases when it is back
