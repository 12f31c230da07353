"""A rank's connection: one thread owns its sockets, beats the heart, receives plans and sends everything."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from safelight.runtime import curve, transport
from safelight.runtime.errors import ProtocolError
from safelight.runtime.messages import (
    ChunkReady,
    ErrorInfo,
    FromWorker,
    GroupFailed,
    Heartbeat,
    HeldState,
    Inventory,
    InventoryRequest,
    Plan,
    PreviewReady,
    Ready,
    Shutdown,
    ToChunks,
    ToWorker,
    WorkerSpec,
)
from safelight.runtime.worker.gate import PlanGate

HEARTBEAT_S = 0.5
MAX_WAITING = 16  # messages to output above which previews are left out
Outbox = deque[tuple[msgspec.Struct, Sequence[bytes | memoryview]]]
log = logging.getLogger(__name__)


class Link:
    """Plans come out of `plans` in order (None: shut down); `send` and `send_chunk` may be called on any thread.

    `held` is called on the link's thread to answer an inventory; it must be quick and thread-safe.
    """

    def __init__(self, spec: WorkerSpec, held: Callable[[], tuple[HeldState, ...]]) -> None:
        self.plans: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self._done = (-1, -1)  # scheduler epoch and number of the last plan completed
        self._spec = spec
        self._held = held
        self._ready: Ready | None = None
        self._gate = PlanGate(spec.group, spec.group_epoch)
        self._to_scheduler: Outbox = deque()
        self._to_output: Outbox = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, message: FromWorker) -> None:
        """Queues a message to the scheduler."""
        self._post(self._to_scheduler, message, ())

    def send_chunk(self, message: ChunkReady, frames: Sequence[bytes | memoryview] = ()) -> None:
        """Queues a chunk announcement to the output process."""
        self._post(self._to_output, message, frames)

    def send_preview(self, message: PreviewReady, pixels: memoryview) -> None:
        """Queues a preview to the output process, or drops it when that takes no messages."""
        if len(self._to_output) < MAX_WAITING:
            self._post(self._to_output, message, (pixels,))

    def note_done(self, plan: Plan) -> None:
        """A plan is complete; inventories say so from now on."""
        self._done = (plan.scheduler_epoch, plan.number)

    def announce_ready(self, ready: Ready) -> None:
        """Sends Ready now, and again to every scheduler that starts later."""
        self._ready = ready
        self.send(ready)

    def close(self, timeout_s: float = 2.0) -> None:
        """Sends what is queued and ends the thread."""
        self._stop = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout_s)

    def _post(self, outbox: Outbox, message: msgspec.Struct, frames: Sequence[bytes | memoryview]) -> None:
        outbox.append((message, frames))
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        spec = self._spec
        identity = transport.worker_identity(spec.group, spec.rank, spec.group_epoch)
        context: zmq.Context[Any] = zmq.Context()
        keys = curve.client_keys(Path(spec.keys)) if spec.keys else None
        with (
            transport.connect_dealer(context, spec.endpoints.plans, ToWorker, identity, keys) as scheduler,
            transport.connect_dealer(context, spec.endpoints.chunks, ToChunks, identity, keys) as output,
        ):
            poller = zmq.Poller()
            poller.register(scheduler.socket, zmq.POLLIN)
            poller.register(self._wake, zmq.POLLIN)
            next_beat = 0.0
            while not (self._stop and not self._to_scheduler and not self._to_output):
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + HEARTBEAT_S
                    self._to_scheduler.append((self._heartbeat(), ()))
                _flush(self._to_scheduler, scheduler)
                _flush(self._to_output, output)
                if dict(poller.poll(max(0, int((next_beat - time.monotonic()) * 1000) + 1))).get(self._wake):
                    os.eventfd_read(self._wake)
                for received in scheduler.receive_all():
                    self._receive(received.message)
        context.term()

    def _receive(self, message: ToWorker) -> None:
        match message:
            case Plan():
                try:
                    if self._gate.admit(message):
                        self.plans.put(message)
                except ProtocolError as error:
                    self._fail(error)
            case InventoryRequest(scheduler_epoch=epoch):
                self._gate.meet_scheduler(epoch)
                if self._ready:
                    self.send(self._ready)
                self.send(self._inventory(epoch))
            case Shutdown(reason=reason):
                log.info("shutting down: %s", reason)
                self.plans.put(None)

    def _fail(self, error: ProtocolError) -> None:
        spec = self._spec
        self.send(GroupFailed(spec.group, spec.rank, spec.group_epoch, ErrorInfo(error.code, error.message)))
        self.plans.put(None)

    def _heartbeat(self) -> Heartbeat:
        spec = self._spec
        return Heartbeat(
            group=spec.group,
            rank=spec.rank,
            world_size=spec.world_size,
            group_epoch=spec.group_epoch,
            pid=os.getpid(),
            ready=self._ready is not None,
            scheduler_epoch=self._gate.received_epoch,
            last_received=self._gate.last_received,
            last_done=self._last_done(),
        )

    def _last_done(self) -> int:
        """Of the scheduler whose plan came last: the numbers of different schedulers cannot be compared."""
        epoch, number = self._done
        return number if epoch == self._gate.received_epoch else -1

    def _inventory(self, asker: int) -> Inventory:
        spec = self._spec
        return Inventory(
            scheduler_epoch=asker,
            group=spec.group,
            rank=spec.rank,
            group_epoch=spec.group_epoch,
            received_epoch=self._gate.received_epoch,
            last_received=self._gate.last_received,
            last_done=self._last_done(),
            states=self._held(),
        )


def _flush(outbox: Outbox, channel: transport.Channel[Any]) -> None:
    while outbox:
        message, frames = outbox[0]
        try:
            channel.send(message, frames=frames)
        except transport.PeerUnreachable:
            return  # its process has been away for long; tried again at the next wake-up
        outbox.popleft()
