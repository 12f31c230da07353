"""The ordered event stream of each job, without sockets.

Delivery is by level, not by edge: a stream keeps its newest event only, a subscription remembers the sequence number
it saw last, and whatever is newer is due. A slow subscriber thus skips progress and never a terminal; a new one starts
with the snapshot. A subscription ends with the terminal, with Unsubscribe, or when its peer is gone.

Of previews a stream keeps the last few until its terminal: subscribers get those that they have not seen, in order.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from safelight.runtime.messages import Event, PreviewMade, Progress, Publish, Stage, Subscribe, Unsubscribe

MAX_TERMINALS = 10_000
MAX_SUBSCRIBED_JOBS = 100_000
KEPT_PREVIEWS = 4  # of a job, for subscribers that come late or are slow
NOTHING_SEEN = -2
UNKNOWN = -1  # the sequence number of "no such job"


class Delivery(enum.Enum):
    SENT = enum.auto()
    BUSY = enum.auto()  # try again later
    GONE = enum.auto()  # the peer does not exist any more


class Send(Protocol):
    """Sends to a peer; `data` is a preview's picture."""

    def __call__(self, peer: bytes, event: Event | PreviewMade, data: bytes = b"") -> Delivery: ...


@dataclass(slots=True)
class _Stream:
    owner: str | None  # None: published before it was opened (both come again after a restart), seen by nobody yet
    latest: Event
    seq: int = 0
    previews: deque[tuple[PreviewMade, bytes]] = field(default_factory=lambda: deque(maxlen=KEPT_PREVIEWS))
    shown: tuple[int, int] = (-1, -1)  # (output, number) of the last preview


@dataclass(slots=True)
class _Seen:
    """The sequence numbers of the last event and of the last preview that a subscriber was sent."""

    event: int
    preview: int


class EventStreams:
    """All streams and subscriptions. `blocked` names the jobs with an event that a subscriber could not take yet."""

    def __init__(self, max_terminals: int = MAX_TERMINALS, max_subscribed_jobs: int = MAX_SUBSCRIBED_JOBS) -> None:
        self.blocked: set[str] = set()
        self._streams: dict[str, _Stream] = {}
        self._terminals: dict[str, None] = {}  # oldest use first
        self._subscribers: dict[str, dict[tuple[bytes, str], _Seen]] = {}  # job -> (peer, owner)
        self._max_terminals = max_terminals
        self._max_subscribed_jobs = max_subscribed_jobs

    def open(self, job: str, owner: str) -> None:
        """Starts the stream with "queued". A job that is open already goes on as it was."""
        stream = self._streams.get(job)
        if stream is None:
            self._streams[job] = _Stream(owner, Event(job, 0, progress=Progress(job, Stage.QUEUED)))
        elif stream.owner is None:
            stream.owner = owner

    def progress(self, progress: Progress) -> None:
        """Ignored for unknown and ended jobs."""
        stream = self._streams.get(progress.job)
        if stream is not None and stream.latest.status is None:
            stream.seq += 1
            stream.latest = Event(progress.job, stream.seq, progress=progress)

    def preview(self, preview: PreviewMade, data: bytes) -> None:
        """Numbers a preview. Ignored for unknown and ended jobs, and when it is no news: a later attempt makes the
        same pictures again."""
        stream, place = self._streams.get(preview.job), (preview.index, preview.number)
        if stream is None or stream.latest.status is not None or place <= stream.shown:
            return
        stream.seq += 1
        stream.shown = place
        stream.previews.append((msgspec.structs.replace(preview, seq=stream.seq), data))

    def publish(self, terminal: Publish) -> None:
        """Ends the stream; the first terminal wins."""
        job = terminal.job
        stream = self._streams.setdefault(job, _Stream(None, Event(job, 0)))
        if stream.latest.status is not None:
            return
        stream.seq += 1
        stream.previews.clear()
        stream.latest = Event(
            job,
            stream.seq,
            status=terminal.status,
            artifacts=terminal.artifacts,
            error=terminal.error,
        )
        self._terminals[job] = None
        if len(self._terminals) > self._max_terminals:
            oldest = next(iter(self._terminals))
            del self._terminals[oldest], self._streams[oldest]

    def subscribe(self, peer: bytes, request: Subscribe) -> None:
        """The snapshot is due at once, unless it is progress that the peer has seen (`after_seq`); previews that it was
        sent do not come again."""
        latest = self._visible(request.job, request.owner)
        seen = request.after_seq
        if seen > latest.seq or seen < 0 or latest.status is not None:  # also a number of an earlier instance
            seen = NOTHING_SEEN
        subscriptions = self._subscribers.setdefault(request.job, {})
        before = subscriptions.get((peer, request.owner))
        subscriptions[(peer, request.owner)] = _Seen(seen, max(seen, before.preview if before else NOTHING_SEEN))
        if request.job in self._terminals:
            self._terminals[request.job] = self._terminals.pop(request.job)
        if len(self._subscribers) > self._max_subscribed_jobs:
            del self._subscribers[next(iter(self._subscribers))]

    def unsubscribe(self, peer: bytes, request: Unsubscribe) -> None:
        self._remove(request.job, (peer, request.owner))

    def deliver(self, job: str, send: Send) -> None:
        """Sends what is due to the job's subscribers."""
        self.blocked.discard(job)
        gone = set()
        for (peer, owner), seen in list(self._subscribers.get(job, {}).items()):
            match self._catch_up(job, peer, owner, seen, send):
                case Delivery.BUSY:
                    self.blocked.add(job)
                case Delivery.GONE:
                    gone.add(peer)
                case Delivery.SENT if self._visible(job, owner).status is not None:
                    self._remove(job, (peer, owner))
        if gone:
            self._forget(gone)

    def _catch_up(self, job: str, peer: bytes, owner: str, seen: _Seen, send: Send) -> Delivery:
        """Sends a subscriber what it has not seen, up to the first that cannot be sent."""
        stream, latest = self._streams.get(job), self._visible(job, owner)
        due: list[tuple[Event | PreviewMade, bytes]] = [(latest, b"")] if latest.seq > seen.event else []
        if stream is not None and stream.owner == owner:
            due += [(made, data) for made, data in stream.previews if made.seq > seen.preview]
        for event, data in sorted(due, key=lambda item: item[0].seq):
            if (delivery := send(peer, event, data)) is not Delivery.SENT:
                return delivery
            if isinstance(event, Event):
                seen.event = event.seq
            else:
                seen.preview = event.seq
        return Delivery.SENT

    def _visible(self, job: str, owner: str) -> Event:
        """The newest event as this owner sees it: another owner's job looks unknown."""
        stream = self._streams.get(job)
        if stream is None or stream.owner != owner:
            return Event(job, UNKNOWN, known=False)
        return stream.latest

    def _remove(self, job: str, subscription: tuple[bytes, str]) -> None:
        subscriptions = self._subscribers.get(job, {})
        subscriptions.pop(subscription, None)
        if not subscriptions:
            self._subscribers.pop(job, None)

    def _forget(self, peers: set[bytes]) -> None:
        for job, subscriptions in list(self._subscribers.items()):
            for subscription in [s for s in subscriptions if s[0] in peers]:
                self._remove(job, subscription)
