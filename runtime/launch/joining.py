"""Ranks that torchrun starts: they join, are observed, and are told to leave. Their agent owns their restarts.

A round is one process for each rank of torchrun's world. It begins when all of them are here, and ends when one is
started again (its agent restarted the round), or when the supervisor ends a group of it. Restart counts of torchrun are
of one agent each and begin again with every torchrun, so group epochs are the supervisor's own.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

import safelight
from safelight.runtime import transport
from safelight.runtime.curve import Gatekeeper, server_keys
from safelight.runtime.errors import ConfigError, Conflict
from safelight.runtime.messages import (
    ErrorInfo,
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

ABSENT_S = 3.0  # a rank says twice a second that it is there
BUSY_S = 30.0  # another torchrun may take over once the last rank of the one before was silent for so long
DISMISSAL_S = 5.0
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class JoinedRank:
    """A rank of another parent: what it says is kept here, and it can be asked to leave."""

    join: Join
    identity: bytes
    say: Callable[[FromJoin, bytes], bool]
    heard_at: float
    ready: bool = False
    dismissed: bool = False
    welcomed: Welcome | None = None
    _said: deque[PhaseReport | Ready | GroupFailed] = field(default_factory=deque)

    def welcome(self, message: Welcome) -> None:
        """It may start; said again until it knows."""
        self.welcomed = message
        self.say(message, self.identity)

    def heard(self, message: PhaseReport | Ready | GroupFailed) -> None:
        self._said.append(message)

    def descriptors(self) -> tuple[int, ...]:
        return ()

    def messages(self) -> Iterator[PhaseReport | Ready | GroupFailed]:
        while self._said:
            yield self._said.popleft()

    def ended(self, ready: set[int]) -> str | None:
        """Only its agent sees that; others learn of it by silence, or by the next round."""
        return None

    def state(self) -> str:
        return "?"

    def kill(self, failed: bool = True) -> bool:
        """Asks it to leave; False when it is gone."""
        self.dismissed = True
        reason = "its group ends" if failed else "the server stops"
        return self.say(Leave(reason, failed), self.identity)

    def reap(self) -> None:
        """Its agent does that."""


class JoinDesk:
    """The supervisor's end of the join link. Used on one thread.

    Raises ConfigError for tcp without keys, StartupError when it cannot listen.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, keys: str | None, world_size: int, device: str
    ) -> None:
        curve = server_keys(Path(keys)) if keys else None
        self._gate = Gatekeeper(context, curve.allowed) if curve else None
        self._world_size, self._device = world_size, device
        try:
            self._channel: transport.Channel[ToJoin] = transport.bind_router(context, endpoint, ToJoin, curve)
        except BaseException:
            self._close_gate()
            raise
        self._here: dict[int, JoinedRank] = {}  # the newest process of each rank
        self.round: Mapping[int, JoinedRank] = {}  # complete and at work, or empty
        self._idle_since = time.monotonic()

    @property
    def socket(self) -> zmq.Socket[bytes]:
        return self._channel.socket

    @property
    def present(self) -> int:
        """Ranks that are here now."""
        now = time.monotonic()
        return sum(not rank.dismissed and now - rank.heard_at < ABSENT_S for rank in self._here.values())

    @property
    def phase(self) -> str:
        return f"waiting for torchrun: {self.present} of {self._world_size} ranks are here"

    @property
    def idle_s(self) -> float:
        """Seconds without a complete round."""
        return 0.0 if self.round else time.monotonic() - self._idle_since

    def receive(self) -> str | None:
        """Takes in what ranks said; a string says why the present round is over."""
        over = None
        for received in self._channel.receive_all():
            if isinstance(received.message, Join):
                over = self._join(received.message, received.identity) or over
            else:
                for rank in self.round.values():
                    if rank.identity == received.identity:
                        rank.heard(received.message)
        return over

    def begin(self) -> Mapping[int, JoinedRank] | None:
        """The ranks of a new round, once all are here and none is of an earlier one."""
        if self.round or self.present < self._world_size:
            return None
        self.round = dict(sorted(self._here.items()))
        return self.round

    def end(self) -> None:
        """The round is over; its processes are not taken into another one."""
        for rank in self.round.values():
            if not rank.dismissed:
                rank.kill()
        self.round, self._idle_since = {}, time.monotonic()

    def dismiss(self) -> None:
        """Tells everyone to leave for good, until they are gone or some seconds have passed; closes."""
        deadline = time.monotonic() + DISMISSAL_S
        left = list(self._here.values())
        while (left := [rank for rank in left if rank.kill(failed=False)]) and time.monotonic() < deadline:
            self._channel.socket.poll(100)
            for _ in self._channel.receive_all():
                pass
        self._channel.close()
        self._close_gate()

    def say(self, message: FromJoin, identity: bytes) -> bool:
        """False when there is no connection: it is gone, or asks again in half a second."""
        try:
            self._channel.send(message, identity)
        except transport.PeerUnreachable:
            return False
        return True

    def _close_gate(self) -> None:
        if self._gate is not None:
            self._gate.close()
            self._gate = None

    def _join(self, join: Join, identity: bytes) -> str | None:
        known = self._here.get(join.rank)
        if known is not None and known.join.instance == join.instance:
            known.heard_at = time.monotonic()
            if known.dismissed:
                known.kill()
            elif join.waiting and known.welcomed is not None:
                self.say(known.welcomed, identity)
            else:
                self.say(Noted(self.present), identity)
            return None
        if refused := self._refusal(join):
            log.error("rank %d of torchrun job %s is refused: %s", join.rank, join.run, refused.message)
            self.say(JoinRefused(ErrorInfo(refused.code, refused.message, refused.param)), identity)
            return None
        self._here[join.rank] = JoinedRank(join, identity, self.say, time.monotonic())
        self.say(Noted(self.present), identity)
        return f"torchrun started rank {join.rank} again" if join.rank in self.round else None

    def _refusal(self, join: Join) -> ConfigError | Conflict | None:
        now = time.monotonic()
        if join.version != safelight.__version__:
            return ConfigError(f"the server is safelight {safelight.__version__}, this rank {join.version}")
        if join.world_size != self._world_size or not 0 <= join.rank < join.world_size:
            return ConfigError(
                f"--num-gpus {self._world_size}: the server expects so many ranks, not {join.world_size}; change "
                "--nnodes and --nproc-per-node, or --num-gpus",
                param="num_gpus",
            )
        others = [rank for rank in self._here.values() if now - rank.heard_at < BUSY_S]
        if any(rank.join.run != join.run for rank in others):
            return Conflict(f"the ranks of torchrun job {others[0].join.run} work for this server, {join.run} came too")
        devices = {rank.join.device for rank in others} | ({self._device} - {"auto"})
        if devices - {join.device}:
            return ConfigError(
                f"--device: {', '.join(sorted(devices))} expected as on the other ranks, got {join.device}",
                param="device",
            )
        return None
