"""The output process: frames in, artifacts on disk and job events out. One loop thread owns every socket."""

from __future__ import annotations

import logging
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zmq

from safelight.runtime import curve, transport
from safelight.runtime.errors import ProtocolError
from safelight.runtime.messages import (
    ChunkReady,
    ControlHeartbeat,
    DropOutput,
    Event,
    FromOutput,
    OpenJob,
    OpenTake,
    OutputHello,
    OutputReady,
    OutputReset,
    OutputSpec,
    PreviewMade,
    PreviewReady,
    Progress,
    Publish,
    Shutdown,
    Subscribe,
    ToChunks,
    ToControlled,
    ToEvents,
    ToOutput,
)
from safelight.runtime.output.artifacts import ArtifactStore
from safelight.runtime.output.events import Delivery, EventStreams
from safelight.runtime.output.previews import Previews
from safelight.runtime.output.takes import Takes
from safelight.runtime.slots import MappedPool

HEARTBEAT_S = 0.5
RETRY_MS = 20  # while a subscriber's queue is full
log = logging.getLogger(__name__)


def main(spec: OutputSpec) -> None:
    """Runs until a Shutdown arrives from the supervisor or the scheduler. Raises StartupError."""
    with ExitStack() as stack:
        output = Output(spec, stack)
        output.run()


class Output:
    """Sockets and clock around `Takes` and `EventStreams`; what it opens is closed by `stack`."""

    def __init__(self, spec: OutputSpec, stack: ExitStack) -> None:
        context: zmq.Context[Any] = stack.enter_context(zmq.Context())
        ends, identity = spec.endpoints, transport.OUTPUT_IDENTITY
        slots = MappedPool(spec.slots)
        stack.callback(slots.close)
        store = ArtifactStore(spec.artifact_dir)
        for path in store.sweep():
            log.info("deleted %s, left unfinished by a process that is gone", path)
        keys = curve.server_keys(Path(spec.keys)) if spec.keys else None
        if keys is not None:
            stack.enter_context(curve.Gatekeeper(context, keys.allowed))
        self._chunks = stack.enter_context(transport.bind_router(context, ends.chunks, ToChunks, keys))
        self._subscribers = stack.enter_context(transport.bind_router(context, ends.events, ToEvents))
        self._decisions = stack.enter_context(transport.connect_dealer(context, ends.decisions, ToOutput, identity))
        self._control = stack.enter_context(transport.connect_dealer(context, ends.control, ToControlled, identity))
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        stack.callback(os.close, self._wake)
        pool = ThreadPoolExecutor(spec.encode_threads, thread_name_prefix="encode")
        self._takes = Takes(slots, store, pool, self._tell, lambda: os.eventfd_write(self._wake, 1))
        stack.callback(self._takes.close)
        self._previews = Previews(pool, lambda: os.eventfd_write(self._wake, 1))
        self._streams = EventStreams()
        self._instance = uuid.uuid4().hex
        self._stop: Shutdown | None = None

    def run(self) -> None:
        """Decisions are read before chunks: a chunk's OpenTake was sent first."""
        poller = zmq.Poller()
        for channel in (self._decisions, self._chunks, self._subscribers, self._control):
            poller.register(channel.socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        log.info("output started, instance %s", self._instance)
        beat = time.monotonic()
        while self._stop is None:
            if time.monotonic() >= beat:
                beat = time.monotonic() + HEARTBEAT_S
                self._beat()
            wait_ms = max(0, round((beat - time.monotonic()) * 1000))
            ready = dict(poller.poll(min(wait_ms, RETRY_MS) if self._streams.blocked else wait_ms))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            self._receive()
            self._takes.collect()
            self._send_previews()
            for job in list(self._streams.blocked):
                self._streams.deliver(job, self._send_event)
        log.info("output stops: %s", self._stop.reason)

    def _receive(self) -> None:
        for decision in self._decisions.receive_all():
            self._decide(decision.message)
        for chunk in self._chunks.receive_all(limit=100):
            if isinstance(chunk.message, ChunkReady):
                self._takes.chunk(chunk.message, chunk.frames)
            else:
                self._add_preview(chunk.message, chunk.frames)
        for request in self._subscribers.receive_all():
            if isinstance(request.message, Subscribe):
                self._streams.subscribe(request.identity, request.message)
                self._streams.deliver(request.message.job, self._send_event)
            else:
                self._streams.unsubscribe(request.identity, request.message)
        for order in self._control.receive_all():
            if isinstance(order.message, Shutdown):
                self._stop = order.message

    def _decide(self, decision: ToOutput) -> None:
        """Carries out one message of the scheduler; one that no correct scheduler sends is logged and dropped."""
        try:
            match decision:
                case OpenJob():
                    self._takes.open_job(decision)
                    self._streams.open(decision.job, decision.owner)
                case OpenTake():
                    self._takes.open_take(decision)
                case Progress():
                    self._streams.progress(decision)
                case DropOutput():
                    self._takes.drop(decision.job, decision.attempt)
                case Publish():
                    self._publish(decision)
                case OutputReset():
                    self._takes.reset(OutputReady(self._instance, decision.scheduler_epoch))
                case Shutdown():
                    self._stop = decision
        except ProtocolError as error:
            log.error("refused a decision: %s", error)
            return
        if isinstance(decision, OpenJob | Progress | Publish):
            self._streams.deliver(decision.job, self._send_event)

    def _add_preview(self, preview: PreviewReady, frames: tuple[memoryview, ...]) -> None:
        job = self._takes.takes_preview(preview.job, preview.attempt)
        if job is None:
            return
        try:
            self._previews.add(preview, frames, job)
        except ProtocolError as error:
            log.error("job %s: %s", preview.job, error)

    def _send_previews(self) -> None:
        for attempt, preview, data in self._previews.collect():
            if self._takes.takes_preview(preview.job, attempt) is not None:
                self._streams.preview(preview, data)
                self._streams.deliver(preview.job, self._send_event)

    def _publish(self, terminal: Publish) -> None:
        try:
            self._takes.publish(terminal.job, terminal.artifacts)
        except OSError as error:
            log.warning("job %s: files that are not part of its result could not be deleted: %s", terminal.job, error)
        self._streams.publish(terminal)

    def _beat(self) -> None:
        pid = os.getpid()
        self._tell(OutputHello(self._instance, pid))
        try:
            self._control.send(ControlHeartbeat("output", self._instance, pid))
        except transport.PeerUnreachable:
            log.debug("the supervisor takes no messages")

    def _tell(self, message: FromOutput) -> None:
        """To the scheduler. Its queue is full only when it is long gone, and the next one starts with a reset."""
        try:
            self._decisions.send(message)
        except transport.PeerUnreachable as error:
            log.warning("dropped %s: %s", type(message).__name__, error)

    def _send_event(self, peer: bytes, event: Event | PreviewMade, data: bytes = b"") -> Delivery:
        try:
            self._subscribers.send(event, peer, (data,) if data else ())
        except transport.PeerBusy:
            return Delivery.BUSY
        except transport.PeerUnreachable:
            return Delivery.GONE
        return Delivery.SENT
