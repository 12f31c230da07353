"""Ranks that torchrun started: rounds of all of them, refusals, restarts and dismissals, over real sockets."""

from __future__ import annotations

import dataclasses
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq
from msgspec import structs

import safelight
from safelight.configs.env import TorchrunRank
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.worker import server_args, worker_endpoint
from safelight.runtime import transport
from safelight.runtime.curve import make_keys
from safelight.runtime.errors import ConfigError, SafelightError, StartupError
from safelight.runtime.launch import torchrun
from safelight.runtime.launch.joining import JoinDesk
from safelight.runtime.launch.membership import Membership
from safelight.runtime.messages import (
    Endpoints,
    ErrorInfo,
    FromJoin,
    GroupFailed,
    Join,
    JoinRefused,
    Leave,
    Noted,
    Ready,
    SlotPool,
    Welcome,
    WorkerSpec,
)

SPEC = WorkerSpec(
    Endpoints("", "", "", "", "", ""), 0, 0, 1, 1, 0, "env://run-0-1", "", None, "cpu", "fp32", "fp32", "",
    SlotPool("/none", 1, 1), 1, 1, "warning",
)  # fmt: skip
WELCOME = Welcome(SPEC, None, "host", "marker")


def joining(rank: int, instance: str = "", **changes: Any) -> Join:
    join = Join(instance or f"a{rank}", "run", rank, 2, rank, 2, "cpu", safelight.__version__, waiting=True)
    return structs.replace(join, **changes)


class Ranks:
    """A desk for two ranks, and what fake ranks hear."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.context: zmq.Context[Any] = stack.enter_context(zmq.Context())
        self.endpoint = f"ipc://{folder}/join"
        self.desk = JoinDesk(self.context, self.endpoint, None, 2, "auto")
        stack.callback(self.desk._channel.close)
        self.stack = stack
        self.over: list[str] = []

    def rank(self, join: Join) -> transport.Channel[FromJoin]:
        """A rank that has just said that it is here."""
        identity = f"join-{join.instance}".encode()
        channel = transport.connect_dealer(self.context, self.endpoint, FromJoin, identity)
        self.stack.enter_context(channel)
        channel.send(join)
        return channel

    def step(self) -> None:
        if self.desk.socket.poll(100):
            reason = self.desk.receive()
            self.over += [reason] if reason else []

    def hears(self, channel: transport.Channel[FromJoin], kind: type[Any]) -> Any:
        for _ in range(100):
            self.step()
            for received in channel.receive_all():
                if isinstance(received.message, kind):
                    return received.message
        raise AssertionError(f"no {kind.__name__}")

    def pair(self, instance: str) -> list[transport.Channel[FromJoin]]:
        """Both ranks of a round, noted."""
        channels = [self.rank(joining(rank, f"{instance}{rank}")) for rank in (0, 1)]
        for channel in channels:
            self.hears(channel, Noted)
        return channels


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    with ExitStack() as stack:
        yield Ranks(tmp_path, stack)


def test_a_round_begins_when_all_ranks_are_here(ranks: Ranks) -> None:
    ranks.hears(ranks.rank(joining(1)), Noted)
    assert ranks.desk.begin() is None
    assert "1 of 2" in ranks.desk.phase
    first = ranks.rank(joining(0))
    assert ranks.hears(first, Noted) == Noted(2)
    begun = ranks.desk.begin()
    assert begun is not None
    assert [begun[rank].join.rank for rank in (0, 1)] == [0, 1]
    assert ranks.desk.begin() is None, "it begins once"
    begun[0].welcome(WELCOME)
    assert ranks.hears(first, Welcome) == WELCOME
    first.send(joining(0))  # the answer was lost
    assert ranks.hears(first, Welcome) == WELCOME
    first.send(joining(0, waiting=False))
    assert ranks.hears(first, Noted) == Noted(2)


def test_what_a_rank_reports_is_kept_for_its_group(ranks: Ranks) -> None:
    first, _second = ranks.pair("a")
    begun = ranks.desk.begin()
    assert begun is not None
    ready = Ready(0, 0, 2, 1, 1, 1, 1, "cpu")
    first.send(ready)
    first.send(joining(0, "a0"))
    ranks.hears(first, Noted)
    assert list(begun[0].messages()) == [ready]
    assert list(begun[1].messages()) == []


def test_a_rank_that_is_started_again_ends_the_round_and_old_processes_join_no_other(ranks: Ranks) -> None:
    old = ranks.pair("a")
    assert ranks.desk.begin()
    new = ranks.rank(joining(1, "b1"))
    ranks.hears(new, Noted)
    assert ranks.over == ["torchrun started rank 1 again"]
    ranks.desk.end()
    assert ranks.hears(old[0], Leave).failed
    old[0].send(joining(0, "a0"))
    assert ranks.hears(old[0], Leave).failed
    assert ranks.desk.begin() is None
    ranks.hears(ranks.rank(joining(0, "b0")), Noted)
    begun = ranks.desk.begin()
    assert begun is not None
    assert {rank.join.instance for rank in begun.values()} == {"b0", "b1"}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"world_size": 4}, "config_error", "--num-gpus 2"),
        ({"rank": 7}, "config_error", "--num-gpus 2"),
        ({"version": "0.0.0"}, "config_error", "this rank 0.0.0"),
        ({"device": "cuda"}, "config_error", "cpu expected as on the other ranks, got cuda"),
        ({"run": "another"}, "conflict", "another came too"),
    ],
)
def test_a_rank_that_does_not_fit_is_refused(ranks: Ranks, changes: dict[str, Any], code: str, message: str) -> None:
    ranks.hears(ranks.rank(joining(0)), Noted)
    refused = ranks.hears(ranks.rank(structs.replace(joining(1, "x"), **changes)), JoinRefused)
    assert refused.error.code == code
    assert message in refused.error.message
    assert "1 of 2" in ranks.desk.phase


def test_at_the_end_all_ranks_are_told_and_waited_for(ranks: Ranks) -> None:
    channels = ranks.pair("a")
    closing = threading.Thread(target=ranks.desk.dismiss)
    closing.start()
    for channel in channels:
        assert channel.socket.poll(5000)
        (message,) = {received.message for received in channel.receive_all()}
        assert message == Leave("the server stops", False)
        assert closing.is_alive()
        channel.close()
    closing.join(10)
    assert not closing.is_alive()


# ---- a rank's end


class Member:
    """A rank's real end, against the desk of `Ranks`."""

    def __init__(self, ranks: Ranks, join: Join) -> None:
        self.ranks, self.left = ranks, threading.Event()
        self.leave: Leave | None = None
        self.membership = Membership(ranks.endpoint, None, join, self.ended)

    def ended(self, leave: Leave | None) -> None:
        self.leave = leave
        self.left.set()

    def meanwhile(self, work: Callable[[], Any]) -> Any:
        """What `work` returns or raises, on a thread, while the desk goes on."""
        found: list[Any] = []

        def run() -> None:
            try:
                found.append(work())
            except SafelightError as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():
            self.ranks.step()
        if isinstance(found[0], SafelightError):
            raise found[0]
        return found[0]


def nothing() -> None:
    pass


def test_a_member_is_welcomed_reports_and_leaves(ranks: Ranks) -> None:
    member = Member(ranks, joining(0))
    ranks.hears(ranks.rank(joining(1)), Noted)
    while (begun := ranks.desk.begin()) is None:
        ranks.step()
    begun[0].welcome(WELCOME)
    assert member.meanwhile(lambda: member.membership.welcome(10, nothing)) == WELCOME
    failed = GroupFailed(0, 0, 1, ErrorInfo("model_error", "no weights"))
    telling = threading.Thread(target=member.membership.tell, args=(failed,))
    telling.start()
    while not (said := list(begun[0].messages())):
        ranks.step()
    assert said == [failed]
    assert telling.is_alive(), "a failure is told for certain"
    ranks.desk.end()
    telling.join(10)
    assert member.left.is_set()
    assert member.leave == Leave("its group ends", True)


def test_a_refused_member_and_a_silent_server_are_errors(ranks: Ranks) -> None:
    member = Member(ranks, joining(0, world_size=8))
    with pytest.raises(ConfigError, match="--num-gpus 2"):
        member.meanwhile(lambda: member.membership.welcome(10, nothing))
    with pytest.raises(StartupError, match="is it running"):
        Membership("ipc:///nowhere", None, joining(0), lambda leave: None).welcome(0.1, nothing)


def test_a_member_with_a_foreign_key_is_told_why(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make_keys(ours)
    make_keys(theirs)
    (theirs / "server.key").write_bytes((ours / "server.key").read_bytes())
    with zmq.Context() as context:
        desk = JoinDesk(context, "tcp://127.0.0.1:*", str(ours), 2, "auto")
        endpoint = desk.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        member = Membership(endpoint, str(theirs), joining(0), lambda leave: None)
        with pytest.raises(StartupError, match="allow list"):
            member.welcome(1.5, nothing)
        assert desk.present == 0
        desk.dismiss()


# ---- what a host completes


class Store:
    """torchrun's store of one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


@pytest.mark.parametrize("other", ["1", "0"])
def test_checkpoints_need_a_folder_that_every_rank_of_the_group_sees(tmp_path: Path, other: str) -> None:
    (tmp_path / "marker").touch()
    store = Store()
    store.set("run-0-1/checkpoints/1", other)
    spec = structs.replace(SPEC, world_size=2, checkpoint_dir=str(tmp_path))
    found = torchrun._with_checkpoints(spec, WELCOME, store)
    assert found.checkpoint_dir == (str(tmp_path) if other == "1" else "")
    assert store.get("run-0-1/checkpoints/0") == b"1"


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    store = Store()
    found = torchrun._with_checkpoints(structs.replace(SPEC, checkpoint_dir=str(tmp_path)), WELCOME, store)
    assert found.checkpoint_dir == ""
    assert store.get("run-0-1/checkpoints/0") == b"0"


PLACE = TorchrunRank(0, 4, 0, 2, 2, "run", "10.0.0.1", 29500)


def test_the_world_is_torchruns_and_a_contradiction_is_an_error() -> None:
    flags = ["--prompt", "a", "--keys", "k"]
    assert server_args("generate", flags, PLACE).num_gpus == 4
    assert server_args("generate", [*flags, "--num_gpus", "4", "--ring-degree", "2"], PLACE).ring_degree == 2
    with pytest.raises(ConfigError, match="--num-gpus 2 contradicts torchrun, which starts 4"):
        server_args("generate", [*flags, "--num-gpus", "2"], PLACE)
    with pytest.raises(ConfigError, match="--ulysses-degree 3"):
        server_args("generate", [*flags, "--ulysses-degree", "3"], PLACE)
    with pytest.raises(ConfigError, match="--keys: 2 nodes"):
        server_args("generate", flags[:2], PLACE)


def test_an_unknown_flag_ends_the_rank_as_it_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        server_args("generate", ["--promt", "a"], PLACE)
    assert ended.value.code == 2
    assert "--promt" in capsys.readouterr().err


def test_loopback_serves_several_nodes_only_where_it_was_named(tmp_path: Path) -> None:
    args = ServerArgs(num_gpus=2, keys=str(tmp_path))
    named = TorchrunRank(0, 2, 0, 1, 2, "a", "127.0.0.1", 29500)
    assert worker_endpoint(tmp_path, args, named).startswith("tcp://127.0.0.1:")
    with pytest.raises(ConfigError, match="which other nodes cannot reach") as caught:
        worker_endpoint(tmp_path, args, dataclasses.replace(named, master_addr="localhost"))
    assert caught.value.param == "interface"


# ---------------------------------------------------------------------------------------------------------------------
# The command beside rank 0


@pytest.fixture
def command(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], torchrun.Frontend]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)])
    try:
        yield process, torchrun.Frontend("", "", process.pid, str(tmp_path))
    finally:
        process.kill()
        process.wait()


def test_a_command_that_has_no_arguments_yet_is_not_taken_for_one_that_has_ended(
    command: tuple[subprocess.Popen[bytes], torchrun.Frontend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent may go on while the kernel is still setting it up, as happens on a busy machine."""
    process, frontend = command
    read, early = torchrun._command_line, [b"", b""]
    monkeypatch.setattr(torchrun, "_command_line", lambda pid: early.pop() if early else read(pid))
    handle = torchrun._open_process(frontend)
    assert not early
    assert handle is not None
    process.kill()
    assert select.select([handle], [], [], 10)[0]
    os.close(handle)


def test_a_command_that_has_ended_or_whose_number_is_anothers_is_not_found(
    command: tuple[subprocess.Popen[bytes], torchrun.Frontend],
) -> None:
    process, frontend = command
    assert torchrun._open_process(structs.replace(frontend, folder="/another")) is None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not waited for: it has no arguments any more
    assert torchrun._open_process(frontend) is None
    process.wait()
    assert torchrun._open_process(frontend) is None
