"""What the supervisor decides, without processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from safelight.configs.server_args import ServerArgs
from safelight.runtime import hub
from safelight.runtime.errors import StartupError
from safelight.runtime.launch.processes import Rank
from safelight.runtime.launch.supervisor import Supervisor
from safelight.runtime.messages import ErrorInfo, KillGroup, RankSilent


class ReadyRank:
    ready = True


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor(ServerArgs(device="cpu", num_gpus=2, replicas=2), hub.builtin_model(), 1024)
    yield made
    for group in made._groups.groups:
        group.ranks = []
    made.stop()


def test_a_group_given_up_does_not_keep_the_others_waiting(supervisor: Supervisor) -> None:
    supervisor._groups.groups[0].ranks = [cast(Rank, ReadyRank())]
    with pytest.raises(StartupError, match="not ready after"):
        supervisor.wait_ready(0.01)
    supervisor._groups.groups[1].given_up = ErrorInfo("startup_error", "no memory")
    supervisor.wait_ready(0.01)


@pytest.mark.parametrize(
    "message", [KillGroup(7, 0, "?"), KillGroup(-3, 0, "?"), RankSilent(0, 9, 0, 9.0), KillGroup(0, 5, "late")]
)
def test_messages_about_groups_that_are_not_there_are_ignored(supervisor: Supervisor, message: Any) -> None:
    supervisor._handle(b"scheduler", message, 0.0)
    assert [group.epoch for group in supervisor._groups.groups] == [0, 0]
