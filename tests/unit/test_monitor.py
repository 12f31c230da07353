"""/health tells a death or a hang within two seconds, whenever it happens between two questions and two heartbeats."""

from __future__ import annotations

import os
from typing import Any, cast

import pytest

from safelight.entrypoints.async_client import AsyncClient
from safelight.entrypoints.http.monitor import ASK_S, Monitor
from safelight.runtime.messages import GroupState, ServerStatus

BEAT_S = 0.5  # of ranks and output


def last(now: float, every: float, offset: float) -> float:
    """When something that happens every so often has happened last."""
    return offset + every * ((now - offset) // every)


class World:
    """A server whose parts beat until one of them is silent; `at(now)` is what /health says then."""

    def __init__(self, silent: str, since: float, beat: float, ask: float) -> None:
        self.silent, self.since, self.beat, self.ask = silent, since, beat, ask
        self.now = 0.0
        self.monitor = Monitor(cast(AsyncClient, None), os.getppid(), lambda: self.now)

    def _silence(self, part: str, asked: float) -> float:
        heard = last(min(asked, self.since) if part == self.silent else asked, BEAT_S, self.beat)
        return asked - heard

    def at(self, now: float) -> Any:
        asked = last(now, ASK_S, self.ask)
        if self.silent == "scheduler":
            asked = last(min(now, self.since), ASK_S, self.ask)  # later questions have no answer
        groups = (GroupState(0, 0, "ready", 1, 1, self._silence("workers 0", asked)),)
        self.monitor.status = ServerStatus(True, False, groups, True, 0, 0, self._silence("output", asked))
        self.monitor._answered = asked
        self.now = now
        return self.monitor.health()


@pytest.mark.parametrize("part", ["scheduler", "output", "workers 0"])
def test_silence_is_told_within_two_seconds_and_life_never_called_death(part: str) -> None:
    for beat in (0.0, 0.1, 0.3, 0.49):
        for ask in (0.0, 0.15, 0.39):
            for since in (10.0, 10.05, 10.3, 10.499):
                world = World(part, since, beat, ask)
                for tenth in range(80, int(since * 10)):
                    assert world.at(tenth / 10).status == "ok"
                found = world.at(since + 2.0)
                assert found.status == "unhealthy"
                assert "silent" in found.components[part]
                assert [name for name, state in found.components.items() if state != "ok"] == [part]


@pytest.mark.parametrize(("phase", "expected"), [("ready", "ok"), ("dead", "unhealthy"), ("loading", "unhealthy")])
def test_a_group_that_died_is_told_at_once(phase: str, expected: str) -> None:
    world = World("nobody", 1e9, 0.0, 0.0)
    assert world.at(10.0).status == "ok"
    world.monitor.status = ServerStatus(True, False, (GroupState(0, 0, phase, 1, 1),), True, 0, 0)
    assert world.monitor.health().status == expected
