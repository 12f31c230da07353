"""Ctrl-C and its kin in a command that has started processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

PREEMPTED = os.EX_TEMPFAIL  # 75: stopped by SIGTERM with work left that --resume goes on with
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop. `exit_code` is what a shell expects (130 for Ctrl-C)."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.exit_code = 128 + number


class Interrupts:
    """Inside, SIGINT, SIGTERM and SIGHUP raise Interrupted, until `then_call` names what they do instead.

    After `drain_on_terminate` the first SIGTERM only counts in `terminations`: what runs may finish within a grace.
    """

    def __init__(self) -> None:
        self.terminations = 0
        self._drains = self._patient = False
        self._action: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}

    def then_call(self, action: Callable[[], None]) -> None:
        """From now on a signal calls `action`: what is being cleaned up must not be interrupted."""
        self._action = action

    def drain_on_terminate(self, *, always: bool = False) -> None:
        """`always`: later SIGTERMs only count as well: a cluster sends several, and none may keep a state from disk."""
        self._drains, self._patient = True, always

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._action is not None:
            self._action()
        elif number == signal.SIGTERM and self._drains and (self._patient or not self.terminations):
            self.terminations += 1
        else:
            raise Interrupted(number)

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
