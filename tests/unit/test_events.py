"""Event streams: snapshots, order, owners, slow subscribers and what is kept."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from safelight.runtime.messages import Event, PreviewMade, Progress, Publish, Stage, Status, Subscribe, Unsubscribe
from safelight.runtime.output.events import KEPT_PREVIEWS, Delivery, EventStreams

ALICE, BOB = b"alice", b"bob"


class Peers:
    """Subscribers that record what they get; the ones in `busy` and `gone` take nothing."""

    def __init__(self) -> None:
        self.got: dict[bytes, list[Any]] = defaultdict(list)
        self.busy: set[bytes] = set()
        self.gone: set[bytes] = set()

    def send(self, peer: bytes, event: Any, data: bytes = b"") -> Delivery:
        if peer in self.gone:
            return Delivery.GONE
        if peer in self.busy:
            return Delivery.BUSY
        self.got[peer].append(event)
        return Delivery.SENT

    def seqs(self, peer: bytes) -> list[int]:
        return [event.seq for event in self.got[peer]]


def step(job: str, number: int) -> Progress:
    return Progress(job, Stage.DENOISING, step=number, steps=50)


def done(job: str) -> Publish:
    return Publish(job, Status.COMPLETED)


def test_subscriber_gets_the_snapshot_and_then_every_event_in_order() -> None:
    streams, peers = EventStreams(), Peers()
    streams.open("j", "me")
    streams.progress(step("j", 1))
    streams.progress(step("j", 2))
    streams.subscribe(ALICE, Subscribe("j", "me"))
    streams.deliver("j", peers.send)
    for number in (3, 4):
        streams.progress(step("j", number))
        streams.deliver("j", peers.send)
    streams.publish(done("j"))
    streams.deliver("j", peers.send)
    assert [e.progress and e.progress.step for e in peers.got[ALICE]] == [2, 3, 4, None]
    assert peers.seqs(ALICE) == [2, 3, 4, 5]
    assert peers.got[ALICE][-1].status is Status.COMPLETED


def test_unknown_job_is_said_to_be_unknown_and_fires_when_opened() -> None:
    streams, peers = EventStreams(), Peers()
    streams.subscribe(ALICE, Subscribe("j", "me"))
    streams.deliver("j", peers.send)
    assert peers.got[ALICE] == [Event("j", -1, known=False)]
    streams.open("j", "me")
    streams.deliver("j", peers.send)
    assert peers.got[ALICE][1].known
    assert peers.got[ALICE][1].progress == Progress("j", Stage.QUEUED)


def test_another_owners_job_looks_unknown_for_ever() -> None:
    streams, peers = EventStreams(), Peers()
    streams.open("j", "me")
    streams.subscribe(BOB, Subscribe("j", "bob"))
    streams.deliver("j", peers.send)
    streams.progress(step("j", 1))
    streams.publish(done("j"))
    streams.deliver("j", peers.send)
    assert peers.got[BOB] == [Event("j", -1, known=False)]


def test_same_terminal_twice_is_one_event_and_late_subscribers_get_it_too() -> None:
    streams, peers = EventStreams(), Peers()
    streams.open("j", "me")
    streams.subscribe(ALICE, Subscribe("j", "me"))
    for _ in range(2):
        streams.publish(done("j"))
        streams.deliver("j", peers.send)
    streams.progress(step("j", 9))
    streams.publish(Publish("j", Status.FAILED))
    streams.open("j", "me")
    streams.deliver("j", peers.send)
    assert [e.status for e in peers.got[ALICE]] == [Status.COMPLETED]
    streams.subscribe(BOB, Subscribe("j", "me", after_seq=1))
    streams.deliver("j", peers.send)
    assert [e.status for e in peers.got[BOB]] == [Status.COMPLETED]


def test_terminal_that_comes_before_the_job_is_opened_waits_for_its_owner() -> None:
    streams, peers = EventStreams(), Peers()
    streams.publish(done("j"))
    streams.subscribe(ALICE, Subscribe("j", "me"))
    streams.deliver("j", peers.send)
    streams.open("j", "me")
    streams.deliver("j", peers.send)
    assert [e.known for e in peers.got[ALICE]] == [False, True]
    assert peers.got[ALICE][1].status is Status.COMPLETED


def test_resubscribing_skips_progress_seen_but_never_a_terminal() -> None:
    streams, peers = EventStreams(), Peers()
    streams.open("j", "me")
    streams.progress(step("j", 1))
    streams.subscribe(ALICE, Subscribe("j", "me", after_seq=1))
    streams.deliver("j", peers.send)
    assert peers.got[ALICE] == []
    streams.subscribe(BOB, Subscribe("j", "me", after_seq=40))  # counted by an instance before a restart
    streams.deliver("j", peers.send)
    assert peers.seqs(BOB) == [1]
    streams.unsubscribe(BOB, Unsubscribe("j", "me"))
    streams.publish(done("j"))
    streams.deliver("j", peers.send)
    assert peers.seqs(ALICE) == [2]
    assert peers.seqs(BOB) == [1]


def test_slow_subscriber_skips_progress_and_gets_the_terminal() -> None:
    streams, peers = EventStreams(), Peers()
    streams.open("j", "me")
    streams.subscribe(ALICE, Subscribe("j", "me"))
    streams.subscribe(BOB, Subscribe("j", "me"))
    peers.busy = {ALICE}
    for number in range(5):
        streams.progress(step("j", number))
        streams.deliver("j", peers.send)
    assert streams.blocked == {"j"}
    streams.publish(done("j"))
    streams.deliver("j", peers.send)
    peers.busy = set()
    for job in list(streams.blocked):
        streams.deliver(job, peers.send)
    assert peers.seqs(ALICE) == [6]
    assert peers.seqs(BOB) == [1, 2, 3, 4, 5, 6]
    assert not streams.blocked


def test_peer_that_is_gone_loses_all_its_subscriptions() -> None:
    streams, peers = EventStreams(), Peers()
    for job in ("a", "b"):
        streams.open(job, "me")
        streams.subscribe(ALICE, Subscribe(job, "me"))
    peers.gone = {ALICE}
    streams.deliver("a", peers.send)
    peers.gone = set()
    streams.deliver("a", peers.send)
    streams.deliver("b", peers.send)
    assert peers.got[ALICE] == []


def test_terminals_and_subscriptions_kept_are_bounded() -> None:
    streams, peers = EventStreams(max_terminals=2, max_subscribed_jobs=2), Peers()
    for job in ("a", "b"):
        streams.open(job, "me")
        streams.publish(done(job))
    streams.subscribe(BOB, Subscribe("a", "me"))  # a use: b is now the oldest
    streams.deliver("a", peers.send)
    streams.open("c", "me")
    streams.publish(done("c"))
    for job in ("a", "b", "c"):
        streams.subscribe(ALICE, Subscribe(job, "me"))
        streams.deliver(job, peers.send)
    assert {e.job: e.known for e in peers.got[ALICE]} == {"a": True, "b": False, "c": True}
    for job in ("x", "y", "z"):
        streams.subscribe(BOB, Subscribe(job, "me"))
        streams.open(job, "me")
        streams.deliver(job, peers.send)
    assert [e.job for e in peers.got[BOB]] == ["a", "x", "y", "z"]


def preview(number: int, index: int = 0) -> PreviewMade:
    return PreviewMade("j", -1, index, number, number + 1, 8, 8, "image/png", 3)


def places(peers: Peers, peer: bytes) -> list[tuple[int, int] | str]:
    return [(e.index, e.number) if isinstance(e, PreviewMade) else "event" for e in peers.got[peer]]


def test_previews_come_in_order_once_whoever_renews_and_not_after_the_end() -> None:
    streams, peers = EventStreams(), Peers()
    streams.open("j", "me")
    streams.subscribe(ALICE, Subscribe("j", "me"))
    streams.subscribe(BOB, Subscribe("j", "bob"))
    for number, index in ((0, 0), (1, 0), (0, 0), (0, 1), (1, 0), (1, 1)):  # an attempt came again in between
        streams.preview(preview(number, index), b"png")
        streams.progress(step("j", number))
        streams.deliver("j", peers.send)
        streams.subscribe(ALICE, Subscribe("j", "me"))
        streams.deliver("j", peers.send)
    assert [place for place in places(peers, ALICE) if place != "event"] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [e.known for e in peers.got[BOB]] == [False]
    first = [e.seq for e in peers.got[ALICE] if isinstance(e, PreviewMade)]
    assert first == sorted(set(first))
    streams.publish(done("j"))
    streams.preview(preview(2, 1), b"png")
    streams.deliver("j", peers.send)
    assert peers.got[ALICE][-1].status is Status.COMPLETED
    late = b"late"
    streams.subscribe(late, Subscribe("j", "me"))
    streams.deliver("j", peers.send)
    assert [e.status for e in peers.got[late]] == [Status.COMPLETED]


def test_a_late_subscriber_gets_the_last_previews_and_then_the_news() -> None:
    streams, peers = EventStreams(), Peers()
    streams.open("j", "me")
    for number in range(KEPT_PREVIEWS + 2):
        streams.preview(preview(number), b"png")
    streams.progress(step("j", 9))
    streams.subscribe(ALICE, Subscribe("j", "me"))
    streams.deliver("j", peers.send)
    assert places(peers, ALICE) == [(0, number) for number in range(2, KEPT_PREVIEWS + 2)] + ["event"]


def test_a_slow_subscriber_loses_previews_and_never_the_terminal() -> None:
    streams, peers = EventStreams(), Peers()
    streams.open("j", "me")
    streams.subscribe(ALICE, Subscribe("j", "me"))
    peers.busy = {ALICE}
    for number in range(3):
        streams.preview(preview(number), b"png")
        streams.deliver("j", peers.send)
    assert streams.blocked == {"j"}
    streams.publish(done("j"))
    peers.busy = set()
    streams.deliver("j", peers.send)
    assert [e.status for e in peers.got[ALICE]] == [Status.COMPLETED]


ACTIONS = st.lists(
    st.sampled_from(["open", "progress", "preview", "publish", "subscribe", "again", "busy", "free", "deliver"]),
    max_size=60,
)


@given(ACTIONS)
def test_any_history_gives_growing_numbers_and_one_terminal_last(actions: list[str]) -> None:
    streams, peers = EventStreams(), Peers()
    subscribed = published = False
    for number, action in enumerate(actions):
        match action:
            case "open":
                streams.open("j", "me")
            case "progress":
                streams.progress(step("j", number))
            case "preview":
                streams.preview(preview(number), b"png")
            case "publish":
                streams.publish(done("j"))
                published = True
            case "subscribe" if not subscribed:
                streams.subscribe(ALICE, Subscribe("j", "me"))
                subscribed = True
            case "busy":
                peers.busy = {ALICE}
            case "free":
                peers.busy = set()
            case _:
                streams.deliver("j", peers.send)
    peers.busy = set()
    streams.open("j", "me")
    streams.deliver("j", peers.send)
    seqs = peers.seqs(ALICE)
    assert seqs == sorted(set(seqs))
    terminals = [event.status for event in peers.got[ALICE] if isinstance(event, Event) and event.status]
    assert len(terminals) == int(subscribed and published)
    assert not terminals or peers.got[ALICE][-1].status
