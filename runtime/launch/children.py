"""The torch-free children of a supervisor (scheduler, output, frontend): watched, and started again when they end."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import Callable, Sequence

from safelight.runtime import transport
from safelight.runtime.launch.processes import Child, process_state, start_child
from safelight.runtime.messages import (
    ControlHeartbeat,
    FromControlled,
    FrontendSpec,
    OutputSpec,
    SchedulerSpec,
    Shutdown,
    ToControlled,
)

SILENCE_S = 5.0  # of a child, when the kernel says that the process is stopped
HANG_S = 30.0  # of a child, whatever the kernel says
MAX_FAILED_STARTS = 3  # of a group or child in a row that never came up, before it is given up
MAX_DEATHS = 20  # of a child within DEATHS_S: it dies of something that starting again does not mend
DEATHS_S = 60.0
FRONTEND_STOP_S = 3.0  # for answers that are being sent
log = logging.getLogger(__name__)

SpecOf = Callable[[str], SchedulerSpec | OutputSpec | FrontendSpec]


class Children:
    """One process for each role, started in the order of `roles`. `control` is where they beat and are told things.

    Belongs to the supervisor's lock. After `closing` is set nothing is started again.
    """

    def __init__(self, roles: Sequence[str], spec_of: SpecOf, control: transport.Channel[FromControlled]) -> None:
        self._spec_of, self._control = spec_of, control
        self._running: dict[str, Child] = {}
        self._starts: dict[str, list[float]] = {role: [] for role in roles}
        self._failed_starts = dict.fromkeys(roles, 0)
        self.closing = False

    def start(self) -> None:
        for role in self._starts:
            self._start(role)

    def descriptors(self) -> list[int]:
        """One becomes readable when its child ends."""
        return [child.fd for child in self._running.values()]

    def pids(self) -> dict[str, int]:
        return {role: child.process.pid for role, child in self._running.items()}

    def watch(self, ready: set[int]) -> str | None:
        """Starts again what has ended. A reason: a child cannot run, and the server cannot go on."""
        for child in list(self._running.values()):
            if child.fd in ready and (reason := self._ended(child)):
                return reason
        return None

    def watch_silence(self, now: float) -> str | None:
        """Ends and starts again what has been silent for too long; a reason as above. Call after `heard`."""
        for child in list(self._running.values()):
            silent = now - child.last_seen
            stopped = silent > SILENCE_S and process_state(child.process.pid) in "TtZX"
            if stopped or silent > HANG_S:
                log.error("%s silent for %.0f s: killing it", child.role, silent)
                child.kill()
                if reason := self._ended(child):
                    return reason
        return None

    def heard(self, identity: bytes, beat: ControlHeartbeat, now: float) -> bool:
        """Whether this is the first beat of a new process, which knows nothing yet."""
        child = self._running.get(beat.role)
        if child is None:
            return False
        child.last_seen, child.identity = now, identity
        if child.instance == beat.instance:
            return False
        child.instance = beat.instance
        log.info("%s is up", beat.role)
        return True

    def tell(self, role: str, message: ToControlled) -> bool:
        """Whether it was sent; what a new process must know is told at its first heartbeat."""
        child = self._running.get(role)
        if child is None or not child.identity:
            return False
        try:
            self._control.send(message, child.identity)
        except transport.PeerUnreachable as error:
            log.warning("%s: %s", role, error)
            return False
        return True

    def stop_frontend(self) -> None:
        """First of all, so that its last answers still find the others."""
        if self.tell("frontend", Shutdown("the server stops")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running["frontend"].process.wait(FRONTEND_STOP_S)

    def say_shutdown(self) -> None:
        for role in ("scheduler", "output"):
            self.tell(role, Shutdown("the server stops"))

    def end(self) -> None:
        """Waits for those that were told, ends the others, reaps all."""
        for child in self._running.values():
            try:
                child.process.wait(2 if child.identity else 0)
            except subprocess.TimeoutExpired:
                child.kill()
            child.close()
        self._running.clear()

    def _start(self, role: str) -> None:
        now = time.monotonic()
        self._starts[role] = [t for t in self._starts[role] if now - t < DEATHS_S] + [now]
        self._running[role] = start_child(role, self._spec_of(role), now)

    def _ended(self, child: Child) -> str | None:
        code = child.process.wait()
        error = child.ended_with()
        child.close()
        del self._running[child.role]
        if self.closing:
            return None
        log.error("%s ended with %d: starting it again", child.role, code)
        failed = self._failed_starts[child.role] = 0 if child.instance else self._failed_starts[child.role] + 1
        if (error and failed) or failed >= MAX_FAILED_STARTS or len(self._starts[child.role]) > MAX_DEATHS:
            reason = error.message if error else f"it ended with exit code {code} again and again"
            return f"the {child.role} cannot run: {reason}"
        self._start(child.role)
        return None
