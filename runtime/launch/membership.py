"""A rank's end of the join link: it says that it is here, waits for its specification, hears when it is to leave."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from msgspec import structs

from safelight.runtime import transport
from safelight.runtime.curve import client_keys
from safelight.runtime.errors import SafelightError, StartupError, from_code
from safelight.runtime.messages import (
    FromJoin,
    GroupFailed,
    Join,
    JoinRefused,
    Leave,
    Noted,
    PhaseReport,
    Ready,
    ToJoin,
    Welcome,
)

BEAT_S = 0.5
SERVER_DEAD_S = 30.0
FAREWELL_S = 10.0


class Membership:
    """`ended` is called once, on the link's thread, when the server says Leave (or is silent for long: None); it ends
    the process."""

    def __init__(self, endpoint: str, keys: str | None, join: Join, ended: Callable[[Leave | None], None]) -> None:
        self._endpoint, self._join, self._ended = endpoint, join, ended
        self._context: zmq.Context[Any] = zmq.Context()
        curve = client_keys(Path(keys)) if keys else None
        self._channel: transport.Channel[FromJoin] = transport.connect_dealer(
            self._context, endpoint, FromJoin, f"join-{join.instance}".encode(), curve
        )
        self._answers: queue.SimpleQueue[Welcome | SafelightError] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[ToJoin] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._heard = time.monotonic()
        self._over = threading.Event()
        self._given_up = False
        threading.Thread(target=self._run, name="join", daemon=True).start()

    def welcome(self, timeout_s: float, given_up: Callable[[], None]) -> Welcome:
        """The rank's specification, once all ranks are here; `given_up` is called now and then and may raise.

        Raises what the server refuses this rank with, or StartupError when it is silent for `timeout_s`.
        """
        answer = None
        try:
            while not isinstance(answer, Welcome):
                try:
                    answer = self._answers.get(timeout=BEAT_S)
                except queue.Empty:
                    given_up()
                    if time.monotonic() - self._heard > timeout_s:
                        raise self._silence(timeout_s) from None
                if isinstance(answer, SafelightError):
                    raise answer
        finally:
            self._given_up = not isinstance(answer, Welcome)
        return answer

    def tell(self, message: PhaseReport | Ready | GroupFailed) -> None:
        """Reports to the supervisor; a failure is told for certain, unless nobody hears it."""
        self._outbox.put(message)
        os.eventfd_write(self._wake, 1)
        if isinstance(message, GroupFailed):
            self._over.wait(FAREWELL_S)  # the answer is Leave, which ends the process

    def _silence(self, timeout_s: float) -> StartupError:
        if self._channel.handshakes_failed:
            reason = "it refused the connection: is this client's key in its allow list, and its server.key this one?"
        else:
            reason = "is it running, and is the address right?"
        return StartupError(f"the server at {self._endpoint} did not answer for {timeout_s:.0f} s; {reason}")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._channel.socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        beat = 0.0
        while not self._given_up:
            if time.monotonic() >= beat:
                beat = time.monotonic() + BEAT_S
                self._send(self._join)
            if dict(poller.poll(max(0, round((beat - time.monotonic()) * 1000)))).get(self._wake):
                os.eventfd_read(self._wake)
            while not self._outbox.empty():
                self._send(self._outbox.get())
            for received in self._channel.receive_all():
                self._heard = time.monotonic()
                if self._take(received.message):
                    return
            if not self._join.waiting and time.monotonic() - self._heard > SERVER_DEAD_S:
                self._end(None)
                return
        self._close()

    def _send(self, message: ToJoin) -> None:
        try:
            self._channel.send(message)
        except transport.PeerUnreachable:
            return  # away for long: the next one says the same

    def _take(self, message: FromJoin) -> bool:
        """True when the process is to end."""
        match message:
            case Welcome():
                if self._join.waiting:
                    self._join = structs.replace(self._join, waiting=False)
                    self._answers.put(message)
            case JoinRefused(error=error):
                self._answers.put(from_code(error.code, error.message, error.param))
            case Leave():
                self._end(message)
                return True
            case Noted():
                pass
        return False

    def _end(self, leave: Leave | None) -> None:
        self._close()  # by which the server knows that this rank has heard
        self._ended(leave)
        self._over.set()

    def _close(self) -> None:
        self._channel.close()
        self._context.destroy(0)
