"""Worker groups of one server: what starts again, what is given up, what the scheduler is told. No processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import pytest
import zmq

from safelight.configs.server_args import ServerArgs
from safelight.runtime.errors import ConfigError
from safelight.runtime.launch.children import MAX_FAILED_STARTS
from safelight.runtime.launch.groups import WorkerGroups
from safelight.runtime.launch.processes import Group, RankStarter
from safelight.runtime.messages import (
    ErrorInfo,
    GroupFailed,
    GroupGivenUp,
    GroupStarting,
    KillGroup,
    PhaseReport,
    RankExited,
    RankSilent,
    Ready,
    ToControlled,
    WorkerSpec,
)


class FakeRank:
    """A rank whose descriptor is its own number; it ends when `exit` is set."""

    def __init__(self, group: int, epoch: int, rank: int) -> None:
        self.group, self.epoch, self.rank = group, epoch, rank
        self.said: deque[PhaseReport | Ready | GroupFailed] = deque()
        self.ready = self.killed = self.reaped = False
        self.exit: int | None = None
        self.kernel_state = "S"

    @property
    def descriptor(self) -> int:
        return 10 * self.group + self.rank

    def descriptors(self) -> tuple[int, ...]:
        return (self.descriptor,)

    def messages(self) -> Iterator[PhaseReport | Ready | GroupFailed]:
        while self.said:
            yield self.said.popleft()

    def ended(self, ready: set[int]) -> str | None:
        return f"ended with {self.exit}" if self.exit is not None and self.descriptor in ready else None

    def state(self) -> str:
        return self.kernel_state

    def kill(self) -> None:
        self.killed = True

    def reap(self) -> None:
        assert self.killed
        self.reaped = True


class World:
    """Two groups of two ranks, all of which were started."""

    def __init__(self) -> None:
        self.started: list[FakeRank] = []
        self.told: list[ToControlled] = []
        args = ServerArgs(device="cpu", num_gpus=4, replicas=2)

        def tell(message: ToControlled) -> bool:
            self.told.append(message)
            return True

        def spec(group: Group, rank: int) -> WorkerSpec:
            return cast(WorkerSpec, (group.number, group.epoch, rank))

        self.groups = WorkerGroups(args, cast(RankStarter, self), spec, cast(Any, None), tell)
        self.groups.start(cast("zmq.Context[Any]", None), "cpu")

    def start(self, spec: Any) -> FakeRank:
        self.started.append(FakeRank(*spec))
        return self.started[-1]

    def rank(self, group: int, rank: int) -> FakeRank:
        """The newest process of that rank."""
        return next(made for made in reversed(self.started) if (made.group, made.rank) == (group, rank))

    def says(self, group: int, rank: int, *messages: Any) -> None:
        self.rank(group, rank).said.extend(messages)
        self.groups.watch({self.rank(group, rank).descriptor})

    def ends(self, group: int, rank: int) -> None:
        self.rank(group, rank).exit = -9
        self.groups.watch({self.rank(group, rank).descriptor})

    def comes_up(self, group: int) -> None:
        for rank in range(2):
            self.is_ready(group, rank)

    def is_ready(self, group: int, rank: int) -> None:
        self.says(group, rank, Ready(group, rank, 2, self.rank(group, rank).epoch, 100, 50, 20, "cpu"))

    def heard(self) -> list[ToControlled]:
        told, self.told = self.told, []
        return told


@pytest.fixture
def world() -> World:
    return World()


def test_groups_are_settled_when_all_their_ranks_are_ready(world: World) -> None:
    assert [(made.group, made.epoch, made.rank) for made in world.started] == [
        (0, 0, 0),
        (0, 0, 1),
        (1, 0, 0),
        (1, 0, 1),
    ]
    world.says(1, 0, PhaseReport(1, 0, 0, "loading", 60.0))
    assert world.groups.phase == "loading, starting"
    world.comes_up(0)
    world.is_ready(1, 0)
    assert not world.groups.settled
    world.is_ready(1, 1)
    assert world.groups.settled
    assert world.groups.phase == "ready"
    assert world.groups.failure is None
    assert world.heard() == []


def test_a_rank_that_ends_takes_its_group_with_it_and_no_other(world: World) -> None:
    world.comes_up(0)
    world.comes_up(1)
    before = world.started[:]
    world.ends(0, 1)
    assert [(made.killed, made.reaped) for made in before] == [(True, True)] * 2 + [(False, False)] * 2
    assert [(made.group, made.epoch, made.rank) for made in world.started[4:]] == [(0, 1, 0), (0, 1, 1)]
    assert world.heard() == [RankExited(0, 0, "rank 1 ended with -9"), GroupStarting(0, 1, 2)]
    assert not world.groups.settled
    world.comes_up(0)
    assert world.groups.settled


def test_a_group_that_never_comes_up_is_given_up_and_the_last_ends_the_server(world: World) -> None:
    world.comes_up(1)
    for _ in range(MAX_FAILED_STARTS):
        world.ends(0, 0)
    assert world.heard()[-1] == GroupGivenUp(0, ErrorInfo("startup_error", "rank 0 ended with -9"))
    assert world.groups.settled
    assert world.groups.failure is None
    assert world.groups.phase == "dead, ready"
    for _ in range(3 * MAX_FAILED_STARTS):  # deaths after readiness are no failed starts
        world.comes_up(1)
        world.ends(1, 1)
    assert world.groups.failure is None
    for _ in range(MAX_FAILED_STARTS):
        world.ends(1, 1)
    assert "rank 1 ended with -9" in str(world.groups.failure)


def test_an_error_that_would_come_again_is_final_at_once(world: World) -> None:
    for group in range(2):
        error = ErrorInfo(ConfigError.code, "--dit-precision: no such", "dit_precision")
        world.says(group, 0, GroupFailed(group, 0, 0, error))
        world.ends(group, 0)
    assert [type(message) for message in world.heard()] == [RankExited, GroupGivenUp] * 2
    assert len(world.started) == 4
    assert world.groups.failure is not None
    cause = world.groups.failure.__cause__
    assert isinstance(cause, ConfigError)
    assert cause.param == "dit_precision"


def test_a_group_that_is_silent_ends_only_when_the_kernel_says_why(world: World) -> None:
    world.groups.complaint(RankSilent(0, 1, 0, 9.0))
    assert world.heard() == []
    world.rank(0, 1).kernel_state = "T"
    world.groups.complaint(RankSilent(0, 1, 0, 9.0))
    assert world.heard()[0] == RankExited(0, 0, "rank 1 silent for 9 s, process state T")
    world.groups.complaint(KillGroup(0, 0, "late"))  # of the epoch before
    assert world.heard() == []
    world.groups.complaint(KillGroup(0, 1, "an op is past its deadline"))
    assert world.heard() == [RankExited(0, 1, "an op is past its deadline"), GroupStarting(0, 2, 2)]


def test_a_new_scheduler_learns_of_every_group(world: World) -> None:
    world.ends(0, 0)
    for _ in range(MAX_FAILED_STARTS):
        world.ends(1, 0)
    world.heard()
    world.groups.introduce()
    assert world.heard() == [
        RankExited(0, 0, "before this scheduler"),
        GroupStarting(0, 1, 2),
        RankExited(1, 1, "before this scheduler"),
        GroupGivenUp(1, ErrorInfo("startup_error", "rank 0 ended with -9")),
    ]


def test_at_the_end_every_rank_is_killed_and_reaped(world: World) -> None:
    world.groups.end()
    assert all(made.killed and made.reaped for made in world.started)
    assert world.groups.descriptors() == []
