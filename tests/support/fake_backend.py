"""Scheduler and output at the ZMQ seam, without a model: jobs end when the test says so. And the real app on them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq

from safelight.configs.http_args import HttpArgs
from safelight.entrypoints.http import main
from safelight.entrypoints.http.addresses import UrlPolicy
from safelight.entrypoints.http.app import make_app
from safelight.entrypoints.serve import listen
from safelight.runtime import hub, transport
from safelight.runtime import messages as m
from safelight.runtime.ulid import new_ulid

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100"
    "c9fe92ef0000000049454e44ae426082"
)


@dataclass
class FakeJob:
    submit: m.Submit
    created_at: float
    seq: int
    lease: float
    step: int = 0
    status: m.Status | None = None
    error: m.ErrorInfo | None = None
    artifacts: tuple[m.Artifact, ...] = ()
    ended_at: float | None = None
    subscribers: set[bytes] = field(default_factory=set)
    previews: list[m.PreviewMade] = field(default_factory=list)


class FakeBackend:
    """`auto`: jobs complete at once. `refuse` is asked for each new submit. `silent`: nothing is answered."""

    def __init__(self, folder: Path, *, auto: bool = True) -> None:
        names = ("submit", "plans", "decisions", "chunks", "events", "control")
        self.endpoints = m.Endpoints(**{name: f"ipc://{folder / name}" for name in names})
        self.auto, self.silent = auto, False
        self.refuse: Callable[[m.Submit], m.ErrorInfo | None] = lambda submit: None
        self.jobs: dict[str, FakeJob] = {}
        self.executions: list[str] = []
        self.cancelled: list[str] = []
        self.changed = threading.Condition()
        self._folder, self.inputs = folder, folder / "inputs"
        self._orders: list[Callable[[], None]] = []
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="backend")

    # ---- the test's side

    def complete(self, job: str) -> None:
        self._order(lambda: self._complete(self.jobs[job]))

    def fail(self, job: str, code: str = "job_failed", message: str = "it broke") -> None:
        self._order(lambda: self._end(self.jobs[job], m.Status.FAILED, m.ErrorInfo(code, message)))

    def progress(self, job: str, step: int) -> None:
        def advance() -> None:
            self.jobs[job].step = step
            self._tell(self.jobs[job])

        self._order(advance)

    def preview(self, job: str, number: int, index: int = 0) -> None:
        """A 1x1 picture, to everyone who is or will be subscribed."""

        def send() -> None:
            made = m.PreviewMade(job, number, index, number, number + 1, 1, 1, "image/png", len(PNG))
            self.jobs[job].previews.append(made)
            for peer in list(self.jobs[job].subscribers):
                self._events.send(made, peer, (PNG,))

        self._order(send)

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)

    def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout_s), f"not within {timeout_s} s: {self.jobs}"

    def __enter__(self) -> FakeBackend:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        with (
            transport.bind_router(context, self.endpoints.submit, m.ToScheduler) as self._submit,
            transport.bind_router(context, self.endpoints.events, m.ToEvents) as self._events,
        ):
            poller = zmq.Poller()
            poller.register(self._submit.socket, zmq.POLLIN)
            poller.register(self._events.socket, zmq.POLLIN)
            while not self._stop:
                poller.poll(5)
                with self.changed:
                    orders, self._orders = self._orders, []
                    for order in orders:
                        order()
                    for received in self._submit.receive_all():
                        if not self.silent:
                            self._said(received.identity, received.message)
                    for subscribed in self._events.receive_all():
                        self._subscribed(subscribed.identity, subscribed.message)
                    self.changed.notify_all()
        context.term()

    def _said(self, peer: bytes, message: Any) -> None:
        job = self.jobs.get(getattr(message, "job", ""))
        mine = job is not None and job.submit.owner == message.owner
        missing = m.ErrorInfo("not_found", "there is no such job")
        answer: Any = None
        if isinstance(message, m.Submit):
            answer = self._submitted(message)
        elif isinstance(message, m.QueryStatus):
            groups = (m.GroupState(0, 0, "ready", 1, 1),)
            running = sum(j.status is None for j in self.jobs.values())
            answer = m.ServerStatus(True, False, groups, True, 0, running)
        elif isinstance(message, m.ListJobs):
            answer = self._listed(message)
        elif isinstance(message, m.RenewLease):
            for name in message.jobs:
                if name in self.jobs:
                    self.jobs[name].lease = time.monotonic()
        elif not mine or job is None:
            answer = m.Refused(message.job, missing)
        elif isinstance(message, m.QueryJob):
            answer = self._state(job)
        elif isinstance(message, m.Cancel):
            self.cancelled.append(message.job)
            self._end(job, m.Status.CANCELLED, m.ErrorInfo("cancelled", "cancelled by the client"))
            answer = m.CancelAccepted(message.job)
        elif isinstance(message, m.Forget):
            self._end(job, m.Status.CANCELLED, m.ErrorInfo("cancelled", "deleted by the client"))
            del self.jobs[message.job]
            answer = m.Forgotten(message.job)
        if answer is not None:
            self._submit.send(answer, peer)

    def _submitted(self, submit: m.Submit) -> Any:
        known = self.jobs.get(submit.job)
        if known is not None:
            same = msgspec.msgpack.encode(known.submit) == msgspec.msgpack.encode(submit)
            conflict = m.ErrorInfo("conflict", "the job exists with another body", param="job")
            return m.Accepted(submit.job, existing=True) if same else m.Refused(submit.job, conflict)
        if (error := self.refuse(submit)) is not None:
            return m.Refused(submit.job, error)
        job = self.jobs[submit.job] = FakeJob(submit, time.time(), len(self.executions), time.monotonic())
        self.executions.append(submit.job)
        if self.auto:
            self._complete(job)
        return m.Accepted(submit.job)

    def _complete(self, job: FakeJob) -> None:
        found = []
        for index in range(job.submit.request.num_outputs):
            path = self._folder / f"{job.submit.job}-0-{index}.png"
            path.write_bytes(PNG)
            kind = "video/mp4" if job.submit.request.num_frames > 1 else f"image/{job.submit.request.media.format}"
            found.append(m.Artifact(index, str(path), kind, len(PNG), hashlib.sha256(PNG).hexdigest()))
        job.artifacts = tuple(found)
        self._end(job, m.Status.COMPLETED)

    def _end(self, job: FakeJob, status: m.Status, error: m.ErrorInfo | None = None) -> None:
        if job.status is None:
            job.status, job.error, job.ended_at = status, error, time.time()
            self._tell(job)

    def _state(self, job: FakeJob) -> m.JobState:
        r = job.submit.request
        info = m.JobInfo(
            job.submit.origin, r.prompt, r.height, r.width, r.num_frames, r.fps, r.num_inference_steps, r.seed,
            r.num_outputs, job.created_at, job.ended_at,
        )  # fmt: skip
        stage = m.Stage.DENOISING if job.step else m.Stage.QUEUED
        done = job.status is m.Status.COMPLETED
        progress = 1.0 if done else job.step / r.num_inference_steps
        return m.JobState(
            job.submit.job, stage, job.status, job.artifacts, job.error, info, progress, 0, None if done else 3000.0
        )

    def _listed(self, query: m.ListJobs) -> Any:
        found = [j for j in self.jobs.values() if (j.submit.owner, j.submit.origin) == (query.owner, query.origin)]
        found.sort(key=lambda j: j.seq, reverse=query.descending)
        ids = [j.submit.job for j in found]
        if query.after is not None and query.after not in ids:
            return m.Refused(query.ask, m.ErrorInfo("not_found", "there is no such job"))
        start = ids.index(query.after) + 1 if query.after is not None else 0
        page = tuple(self._state(j) for j in found[start : start + query.limit])
        return m.JobPage(query.ask, page, len(found) > start + query.limit)

    def _subscribed(self, peer: bytes, message: Any) -> None:
        job = self.jobs.get(message.job)
        if job is None or job.submit.owner != message.owner:
            return
        if isinstance(message, m.Subscribe):
            for made in job.previews if peer not in job.subscribers else ():
                self._events.send(made, peer, (PNG,))
            job.subscribers.add(peer)
            self._tell(job)
        else:
            job.subscribers.discard(peer)

    def _tell(self, job: FakeJob) -> None:
        name, steps = job.submit.job, job.submit.request.num_inference_steps
        progress = m.Progress(name, m.Stage.DENOISING if job.step else m.Stage.QUEUED, 0, job.step, steps)
        event = m.Event(name, job.step, True, None if job.status else progress, job.status, job.artifacts, job.error)
        for peer in list(job.subscribers):
            with contextlib.suppress(transport.PeerUnreachable):
                self._events.send(event, peer)


LIMITS = m.RequestLimits(1024 * 1024, 100, 50, 4, 1_000_000, 4_000_000)


@contextlib.contextmanager
def http_server(backend: FakeBackend, *, policy: UrlPolicy | None = None, **changes: Any) -> Iterator[str]:
    """The real application on a free port, in a thread; yields its address."""
    model = m.ServedModel("org/builtin", str(hub.builtin_model()), 1, "fp32", "fp32")
    backend.inputs.mkdir(exist_ok=True)
    spec = m.FrontendSpec(backend.endpoints, -1, model, LIMITS, (), "warning", str(backend.inputs))
    app = make_app(msgspec.structs.replace(spec, **changes), policy)
    server = main.http_server(app)
    listening = listen(HttpArgs(port=0))
    ended: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(server.serve(sockets=[listening]))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, name="http")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), ended
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
    assert not ended, ended


__all__ = ["LIMITS", "PNG", "FakeBackend", "FakeJob", "http_server", "new_ulid"]
