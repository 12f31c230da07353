"""The client against a fake scheduler and a fake output on real sockets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from safelight.entrypoints import client as client_module
from safelight.entrypoints.client import Client
from safelight.entrypoints.previews import Preview
from safelight.runtime import transport
from safelight.runtime.errors import Conflict, JobFailed, NotFound, Overloaded, WorkerLost
from safelight.runtime.messages import (
    Accepted,
    Artifact,
    Cancel,
    CancelAccepted,
    Endpoints,
    ErrorInfo,
    Event,
    GenerationRequest,
    JobState,
    MediaFormat,
    MediaSpec,
    PreviewMade,
    Progress,
    QueryJob,
    QueryStatus,
    Refused,
    RenewLease,
    ServerStatus,
    Stage,
    Status,
    Submit,
    Subscribe,
    ToEvents,
    ToScheduler,
    Unsubscribe,
)

REQUEST = GenerationRequest("a", "", {"prompt": (1,)}, 16, 16, 1, 8, 2, 1.0, 7, 1, "euler", MediaSpec(MediaFormat.PNG))
DONE = (Artifact(0, "/x.png", "image/png", 3, "00"),)


class FakeServer:
    """Answers every message with what `answer(message)` returns, from a thread with the ROUTERs of both links."""

    def __init__(self, folder: Path, answer: Callable[[Any], list[Any]]) -> None:
        names = ("submit", "plans", "decisions", "chunks", "events", "control")
        self.endpoints = Endpoints(**{name: f"ipc://{folder / name}" for name in names})
        self.answer = answer
        self.seen: list[Any] = []
        self.arrived = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        submit = transport.bind_router(context, self.endpoints.submit, ToScheduler)
        events = transport.bind_router(context, self.endpoints.events, ToEvents)
        poller = zmq.Poller()
        for channel in (submit, events):
            poller.register(channel.socket, zmq.POLLIN)
        while not self._stop.is_set():
            poller.poll(20)
            for channel in (submit, events):
                for received in channel.receive_all():
                    with self.arrived:
                        self.seen.append(received.message)
                        self.arrived.notify_all()
                    with contextlib.suppress(transport.PeerUnreachable):  # it has its answer and is gone
                        for reply in self.answer(received.message):
                            frames = (b"a picture",) if isinstance(reply, PreviewMade) else ()
                            channel.send(reply, received.identity, frames)
        submit.close()
        events.close()
        context.term()

    def count(self, kind: type) -> int:
        return sum(isinstance(message, kind) for message in self.seen)

    def wait_for(self, kind: type, count: int = 1) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: self.count(kind) >= count, 20), f"no {kind.__name__} came"

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(autouse=True)
def quick_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RENEW_S", 0.05)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Callable[[Any], list[Any]]], FakeServer]]:
    running: list[FakeServer] = []

    def start(answer: Callable[[Any], list[Any]]) -> FakeServer:
        running.append(FakeServer(tmp_path, answer).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


def progress(job: str, seq: int, step: int) -> Event:
    return Event(job, seq, progress=Progress(job, Stage.DENOISING, 0, step, 2))


def happy(message: Any) -> list[Any]:
    match message:
        case Submit(job=job):
            return [Accepted(job)]
        case Subscribe(job=job):
            return [progress(job, 0, 1), progress(job, 1, 2), Event(job, 2, status=Status.COMPLETED, artifacts=DONE)]
        case Cancel(job=job):
            return [CancelAccepted(job)]
        case QueryStatus():
            return [ServerStatus(True, False, (), True, 0, 0)]
    return []


def test_a_job_is_submitted_followed_and_closed_by_its_terminal(serve: Any) -> None:
    server = serve(happy)
    with Client(server.endpoints) as client:
        job = client.submit(REQUEST)
        events = [event for event in client.events(job) if isinstance(event, Event)]
        assert [event.seq for event in events] == [0, 1, 2]
        assert events[-1].artifacts == DONE
        assert client.open_jobs == frozenset()
    submitted = next(message for message in server.seen if isinstance(message, Submit))
    assert submitted.request == REQUEST
    assert submitted.attached


def test_previews_are_among_the_events_and_nobody_has_to_look_at_them(serve: Any) -> None:
    def made(job: str, number: int, nbytes: int = 9) -> PreviewMade:
        return PreviewMade(job, number, 0, number, number + 1, 8, 8, "image/png", nbytes)

    def answer(message: Any) -> list[Any]:
        if isinstance(message, Subscribe):
            previews = [made(message.job, 0), made(message.job, 1, nbytes=7), made(message.job, 2)]  # one is torn
            previews += [made(message.job, 0)]  # again, of an output process that was started again
            return [*previews, *happy(message), made(message.job, 3)]
        return happy(message)

    with Client(serve(answer).endpoints) as client:
        job = client.submit(REQUEST)
        found = list(client.events(job))
        assert [e.number for e in found if isinstance(e, Preview)] == [0, 2]
        assert [e.data for e in found if isinstance(e, Preview)] == [b"a picture"] * 2
        assert isinstance(found[-1], Event)
        assert client.wait(client.submit(REQUEST)).artifacts == DONE


def test_two_jobs_can_be_waited_for_one_after_the_other(serve: Any) -> None:
    with Client(serve(happy).endpoints) as client:
        first, second = client.submit(REQUEST), client.submit(REQUEST)
        assert client.wait(second).artifacts == DONE
        assert client.wait(first).artifacts == DONE


def test_an_unanswered_submit_is_sent_again_with_the_same_id(serve: Any) -> None:
    deaf = iter([True, True, False])

    def answer(message: Any) -> list[Any]:
        return [] if isinstance(message, Submit) and next(deaf, False) else happy(message)

    server = serve(answer)
    with Client(server.endpoints) as client:
        job = client.submit(REQUEST)
    submits = [message for message in server.seen if isinstance(message, Submit)]
    assert len(submits) == 3
    assert {message.job for message in submits} == {job}


def test_subscriptions_are_renewed_and_repeated_events_are_dropped(serve: Any) -> None:
    subscribed: list[str] = []

    def answer(message: Any) -> list[Any]:
        match message:
            case Submit(job=job):
                return [Accepted(job)]
            case Subscribe(job=job):
                subscribed.append(job)
                if len(subscribed) < 4:
                    return [progress(job, 5, 1)]
                # A restarted output counts from zero again.
                return [progress(job, 0, 2), Event(job, 1, status=Status.COMPLETED, artifacts=DONE)]
        return []

    with Client(serve(answer).endpoints) as client:
        events = [e for e in client.events(client.submit(REQUEST)) if isinstance(e, Event)]
    assert [event.seq for event in events] == [5, 0, 1]


def test_leases_of_attached_jobs_only_are_renewed(serve: Any) -> None:
    server = serve(lambda m: [Accepted(m.job)] if isinstance(m, Submit) else [])
    with Client(server.endpoints) as client:
        client.submit(REQUEST, attached=False)
        attached = client.submit(REQUEST)
        server.wait_for(RenewLease, 2)
    assert all(message.jobs == (attached,) for message in server.seen if isinstance(message, RenewLease))


def test_refusals_become_typed_errors_and_close_the_job(serve: Any) -> None:
    infos = iter([ErrorInfo("overloaded", "full", retry_after_s=3.5), ErrorInfo("conflict", "another body")])
    server = serve(lambda m: [Refused(m.job, next(infos))] if isinstance(m, Submit) else [])
    with Client(server.endpoints) as client:
        with pytest.raises(Overloaded, match="full") as caught:
            client.submit(REQUEST)
        assert caught.value.retry_after_s == 3.5
        with pytest.raises(Conflict):
            client.submit(REQUEST)
        assert client.open_jobs == frozenset()


def test_a_failed_job_raises_its_error(serve: Any) -> None:
    def answer(message: Any) -> list[Any]:
        if isinstance(message, Subscribe):
            return [Event(message.job, 0, status=Status.FAILED, error=ErrorInfo("job_failed", "out of memory"))]
        return happy(message)

    with Client(serve(answer).endpoints) as client:
        job = client.submit(REQUEST)
        with pytest.raises(JobFailed, match="out of memory"):
            client.wait(job)


def test_events_of_unknown_jobs_are_not_delivered(serve: Any) -> None:
    answers = iter([[Event("", 0, known=False)]])

    def answer(message: Any) -> list[Any]:
        if isinstance(message, Subscribe):
            unknown = next(answers, None)
            return [Event(message.job, 0, known=False)] if unknown else happy(message)
        return happy(message)

    with Client(serve(answer).endpoints) as client:
        assert all(isinstance(e, Event) and e.known for e in client.events(client.submit(REQUEST)))


def test_attaching_to_an_unknown_job_is_refused_at_once(serve: Any) -> None:
    missing = ErrorInfo("not_found", "there is no such job")
    server = serve(lambda m: [Refused(m.job, missing)] if isinstance(m, QueryJob) else [])
    with Client(server.endpoints) as client:
        with pytest.raises(NotFound, match="no such job"):
            client.attach("j")
        assert not client.open_jobs


def test_a_job_that_ended_long_ago_has_its_end_although_output_knows_it_no_more(serve: Any) -> None:
    def answer(message: Any) -> list[Any]:
        match message:
            case QueryJob(job=job):
                return [JobState(job, Stage.SAVING, Status.COMPLETED, DONE)]
            case Subscribe(job=job):
                return [Event(job, -1, known=False)]
        return []

    with Client(serve(answer).endpoints) as client:
        client.attach("j")
        [event] = client.poll(10)
        assert isinstance(event, Event)
        assert (event.status, event.artifacts) == (Status.COMPLETED, DONE)
        assert not client.open_jobs


def test_cancel_and_status_are_answered(serve: Any) -> None:
    server = serve(happy)
    with Client(server.endpoints) as client:
        job = client.submit(REQUEST)
        client.cancel(job)
        assert client.status().ready
    assert server.count(Cancel) == 1


def test_a_silent_scheduler_is_a_lost_worker(serve: Any) -> None:
    with Client(serve(lambda _: []).endpoints) as client, pytest.raises(WorkerLost, match="no answer"):
        client.submit(REQUEST, timeout_s=0.1)


def test_a_job_is_followed_before_it_can_start_and_no_longer_when_it_was_not_taken(serve: Any) -> None:
    server = serve(lambda message: [])
    with Client(server.endpoints) as client:
        with pytest.raises(WorkerLost):
            client.submit(REQUEST, timeout_s=0.5)
        server.wait_for(Subscribe)
        server.wait_for(Unsubscribe)
        assert client.open_jobs == frozenset()
