"""The native client of a running server on asyncio: one per event loop, for many owners and thousands of jobs.

What was not answered is sent again every RENEW_S (all requests are idempotent), and so are subscriptions and leases:
the restart of scheduler or output is survived. Events are levels: a follower sees the newest, and never misses the end.
Of previews it sees the last few.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import zmq

from safelight.entrypoints.client import ANSWER_S, RENEW_S, error_of
from safelight.entrypoints.previews import Preview, received
from safelight.runtime import transport
from safelight.runtime.errors import WorkerLost
from safelight.runtime.messages import (
    Accepted,
    Cancel,
    CancelAccepted,
    Endpoints,
    Event,
    Forget,
    Forgotten,
    FromEvents,
    FromScheduler,
    JobPage,
    JobState,
    ListJobs,
    QueryJob,
    QueryStatus,
    Refused,
    RenewLease,
    ServerStatus,
    Submit,
    Subscribe,
    ToScheduler,
    Unsubscribe,
)

KEPT_PREVIEWS = 4  # of a job, for a follower that is busy
LOOK_S = 5.0  # without an event, a follower asks the scheduler: output may know an old job no more
Answer = TypeVar("Answer", Accepted, CancelAccepted, Forgotten, JobPage, JobState, ServerStatus)


@dataclass(slots=True, eq=False)
class _Asked:
    message: ToScheduler
    answered: asyncio.Future[FromScheduler]


@dataclass(slots=True)
class _Stream:
    """What is known of one followed job."""

    followers: int = 0
    latest: Event | None = None
    previews: deque[tuple[int, Preview]] = field(default_factory=lambda: deque(maxlen=KEPT_PREVIEWS))  # counted
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, news: Event | Preview) -> None:
        """Nothing comes after the end, and no preview twice."""
        if self.latest is not None and self.latest.status is not None:
            return
        if isinstance(news, Preview):
            if self.previews and news.place <= self.previews[-1][1].place:
                return
            self.previews.append((self.previews[-1][0] + 1 if self.previews else 0, news))
        else:
            self.latest = news
        self.changed.set()


class _Link:
    """Asks on one DEALER and gives each answer to whoever waits for its kind and job."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        self.channel: transport.Channel[FromScheduler] = transport.connect_dealer(context, endpoint, FromScheduler)
        self._asked: dict[str, list[_Asked]] = defaultdict(list)

    async def ask(self, message: ToScheduler, kind: type[Answer], about: str, timeout_s: float) -> Answer:
        """Raises the error of a refusal, or WorkerLost when there is no answer."""
        asked = _Asked(message, asyncio.get_running_loop().create_future())
        self._asked[about].append(asked)
        self._send(message)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await asked.answered
        except TimeoutError:
            raise WorkerLost(
                f"no answer from the scheduler for {timeout_s:.0f} s; is the server running?", retry_after_s=5
            ) from None
        finally:
            self._asked[about].remove(asked)
            if not self._asked[about]:
                del self._asked[about]
        if isinstance(answer, Refused):
            raise error_of(answer.error)
        assert isinstance(answer, kind), f"{kind.__name__} expected, got {type(answer).__name__}"
        return answer

    def receive(self) -> None:
        for came in self.channel.receive_all(limit=100_000):
            message = came.message
            about = message.ask if isinstance(message, JobPage) else getattr(message, "job", "")
            for asked in self._asked.get(about, ()):
                if not asked.answered.done():
                    asked.answered.set_result(message)

    def send_again(self) -> None:
        for waiting in self._asked.values():
            for asked in waiting:
                if not asked.answered.done():
                    self._send(asked.message)

    def _send(self, message: ToScheduler) -> None:
        with contextlib.suppress(transport.PeerUnreachable):  # sent again later
            self.channel.send(message)


class AsyncClient:
    """`async with AsyncClient(endpoints) as client: ...`; jobs are named by id and owner."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        # One link for each kind of question that may be refused differently for the same job.
        self._submits, self._cancels, self._forgets, self._queries, self._status = self._links = tuple(
            _Link(self._context, endpoints.submit) for _ in range(5)
        )
        self._events: transport.Channel[FromEvents]
        self._events = transport.connect_dealer(self._context, endpoints.events, FromEvents)
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._leases: Counter[tuple[str, str]] = Counter()
        self._receivers: list[tuple[transport.Channel[Any], Callable[[], None]]] = [
            *((link.channel, link.receive) for link in self._links),
            (self._events, self._receive_events),
        ]
        self._renewing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AsyncClient:
        loop = asyncio.get_running_loop()
        for channel, receive in self._receivers:
            loop.add_reader(channel.descriptor, receive)
        self._renewing = asyncio.create_task(self._renew(), name="renew")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._renewing is not None
        self._renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._renewing
        loop = asyncio.get_running_loop()
        for channel, _receive in self._receivers:
            loop.remove_reader(channel.descriptor)
            channel.close()
        self._context.term()

    # ---- questions

    async def submit(self, submit: Submit, timeout_s: float = ANSWER_S) -> Accepted:
        """Returns once the job is journalled. Raises what the scheduler refused it with, or WorkerLost."""
        return await self._ask(self._submits, submit, Accepted, submit.job, timeout_s)

    async def cancel(self, job: str, owner: str, timeout_s: float = ANSWER_S) -> None:
        """Raises NotFound, or WorkerLost."""
        await self._ask(self._cancels, Cancel(job, owner), CancelAccepted, job, timeout_s)

    async def forget(self, job: str, owner: str, timeout_s: float = ANSWER_S) -> None:
        """Ends the job and deletes what there is of it. Raises NotFound, or WorkerLost."""
        await self._ask(self._forgets, Forget(job, owner), Forgotten, job, timeout_s)

    async def job(self, job: str, owner: str, timeout_s: float = ANSWER_S) -> JobState:
        """Raises NotFound, or WorkerLost."""
        return await self._ask(self._queries, QueryJob(job, owner), JobState, job, timeout_s)

    async def jobs(self, query: ListJobs, timeout_s: float = ANSWER_S) -> JobPage:
        """Raises NotFound for an unknown `after`, or WorkerLost."""
        return await self._ask(self._queries, query, JobPage, query.ask, timeout_s)

    async def status(self, timeout_s: float = ANSWER_S) -> ServerStatus:
        """Raises WorkerLost."""
        return await self._ask(self._status, QueryStatus(), ServerStatus, "", timeout_s)

    async def _ask(self, link: _Link, message: ToScheduler, kind: type[Answer], about: str, timeout_s: float) -> Answer:
        asyncio.get_running_loop().call_soon(link.receive)  # a send may swallow the descriptor's edge
        return await link.ask(message, kind, about, timeout_s)

    # ---- events and leases

    @contextlib.contextmanager
    def _followed(self, job: str, owner: str) -> Any:
        key = (job, owner)
        stream = self._streams.setdefault(key, _Stream())
        stream.followers += 1
        if stream.followers == 1:
            self._tell_output(Subscribe(job, owner))
        try:
            yield stream
        finally:
            stream.followers -= 1
            if not stream.followers:
                del self._streams[key]
                self._tell_output(Unsubscribe(job, owner))

    async def events(self, job: str, owner: str) -> AsyncIterator[Event | Preview]:
        """The newest event whenever there is one, up to the job's end, after the previews that came before it.

        Raises NotFound, or WorkerLost.
        """
        told: Event | None = None
        seen = -1
        with self._followed(job, owner) as stream:
            while True:
                if unseen := [item for item in stream.previews if item[0] > seen]:
                    seen, preview = unseen[0]
                    yield preview
                    continue
                if stream.latest is None or stream.latest == told:
                    stream.changed.clear()
                    try:
                        async with asyncio.timeout(LOOK_S):
                            await stream.changed.wait()
                    except TimeoutError:
                        await self._look(job, owner, stream)
                    continue
                told = stream.latest
                yield told
                if told.status is not None:
                    return

    async def end(self, job: str, owner: str) -> Event:
        """The terminal event of a job, whatever it is. Raises NotFound, or WorkerLost."""
        last: Event | None = None
        async for event in self.events(job, owner):
            last = event if isinstance(event, Event) else last
        assert last is not None, "events end with the terminal"
        return last

    def hold(self, job: str, owner: str) -> None:
        """Renews the lease of an attached job until `release` is called as often."""
        self._leases[(job, owner)] += 1

    def release(self, job: str, owner: str) -> bool:
        """Whether nobody holds the job any more."""
        self._leases[(job, owner)] -= 1
        last = self._leases[(job, owner)] <= 0
        if last:
            del self._leases[(job, owner)]
        return last

    async def _look(self, job: str, owner: str, stream: _Stream) -> None:
        state = await self.job(job, owner)
        over = stream.latest is not None and stream.latest.status is not None
        if state.status is not None and not over:
            stream.latest = Event(job, 0, status=state.status, artifacts=state.artifacts, error=state.error)

    def _receive_events(self) -> None:
        by_job: dict[str, list[_Stream]] | None = None
        for came in self._events.receive_all(limit=100_000):
            event = came.message if isinstance(came.message, Event) else received(came.message, came.frames)
            if event is None or (isinstance(event, Event) and not event.known):
                continue
            if by_job is None:
                by_job = defaultdict(list)
                for (job, _owner), stream in self._streams.items():
                    by_job[job].append(stream)
            for stream in by_job.get(event.job, ()):
                stream.note(event)

    def _tell_output(self, message: msgspec.Struct) -> None:
        with contextlib.suppress(transport.PeerUnreachable):  # renewed later
            self._events.send(message)
        asyncio.get_running_loop().call_soon(self._receive_events)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            for link in self._links:
                link.send_again()
            for job, owner in list(self._streams):
                self._tell_output(Subscribe(job, owner))
            leases: dict[str, list[str]] = defaultdict(list)
            for job, owner in self._leases:
                leases[owner].append(job)
            for owner, jobs in leases.items():
                with contextlib.suppress(transport.PeerUnreachable):
                    self._submits.channel.send(RenewLease(tuple(jobs), owner))
            for _channel, receive in self._receivers:
                receive()
