"""Workers that torchrun started: two agents as two nodes with networks of their own, ranks killed, Ctrl-C."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from sys import executable
from typing import Any

import nodes
import numpy as np
import numpy.typing as npt
import pytest
from nodes import Node, Program
from running_server import alive

from safelight.configs.network import free_ports
from safelight.runtime.curve import make_keys

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

STEPS = 200
SIZE = ["--height", "48", "--width", "32", "--num-frames", "5", "--output-format", "npy", "--seed", "3", "--json"]
Frames = npt.NDArray[np.int16]
Start = Callable[..., Program]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that all nodes share, with keys; short enough for socket paths."""
    with tempfile.TemporaryDirectory(prefix="sl-") as made:
        make_keys(Path(made) / "keys")
        yield Path(made)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts programs; what is left of them is killed after the test."""
    with ExitStack() as stack:

        def starter(*argv: str) -> Program:
            program = Program(argv)
            stack.callback(program.kill)
            return program

        yield starter


@pytest.fixture
def pair() -> Iterator[list[Node]]:
    if reason := nodes.why_not():
        pytest.skip(reason)
    with nodes.cluster(2) as made:
        yield made


def generate(model: Path, folder: Path, out: str, *flags: str) -> list[str]:
    where = ["--model-path", str(model), "--output-path", str(folder / out), "--device", "cpu", "--prompt", "a cat"]
    return ["generate", *where, "--num-inference-steps", str(STEPS), *SIZE, *flags]


def torchrun(*flags: str) -> list[str]:
    return [executable, "-m", "torch.distributed.run", *flags, "-m", "safelight.entrypoints.worker"]


def agent(node: Node, first: Node, port: int, *flags: str) -> list[str]:
    """torchrun on one of two nodes. The test's names cannot be looked up in a namespace, so the host is told."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.address}:{port}", "--rdzv-id", "test"]
    place = ["--rdzv-conf", f"is_host={int(node is first)}", "--local-addr", node.address]
    return node.command(*torchrun("--nnodes", "2", "--nproc-per-node", "2", *meeting, *place, *flags))


def frames(folder: Path, out: str) -> Frames:
    (path,) = (folder / out).glob("*.npy")
    found: Frames = np.load(path).astype(np.int16)
    return found


def alone(start: Start, model: Path, folder: Path) -> Frames:
    """What one process makes of the same request."""
    program = start(executable, "-m", "safelight", *generate(model, folder, "alone"))
    assert program.wait() == 0, program.output
    return frames(folder, "alone")


def at_step(step: int) -> Any:
    return lambda events: any(e.get("stage") == "denoising" and e.get("step", 0) >= step for e in events)


def steps_back(program: Program) -> list[int]:
    """Where denoising went on after it had been interrupted."""
    steps = [e["step"] for e in program.events() if e.get("stage") == "denoising"]
    return [after for before, after in pairwise(steps) if after < before]


def encodings(program: Program) -> int:
    """How often the job was begun: a group that is formed again encodes again."""
    return sum(e.get("stage") == "encoding" for e in program.events())


def assert_equal(found: Frames, expected: Frames) -> None:
    """Other layouts add in another order: a few values are rounded the other way."""
    difference = np.abs(found - expected)
    assert difference.max() <= 1, "of 255"
    assert (difference > 0).mean() < 0.01


def test_two_nodes_make_the_picture_of_one_process_although_a_rank_is_killed(
    tiny_model: Path, folder: Path, start: Start, pair: list[Node]
) -> None:
    first, second = pair
    port = free_ports("0.0.0.0", 1)
    flags = ["--keys", str(folder / "keys"), "--interface", first.interface, "--checkpoint-every", "20"]
    command = generate(tiny_model, folder, "nodes", *flags)
    agents = [start(*agent(node, first, port, "--max-restarts", "1"), *command) for node in (first, second)]
    agents[0].until(at_step(70))
    os.kill(agents[1].rank(3), signal.SIGKILL)
    codes = [program.wait() for program in agents]
    assert codes == [0, 0], agents[0].output + agents[1].output
    assert encodings(agents[0]) == 2
    assert all(step > 40 for step in steps_back(agents[0])), "it goes on from the last checkpoint"
    assert agents[1].events() == [], "the command runs on the first node only"
    assert_equal(frames(folder, "nodes"), alone(start, tiny_model, folder))


def test_ranks_of_another_host_join_a_server_and_come_back_when_one_is_killed(
    tiny_model: Path, folder: Path, start: Start, pair: list[Node]
) -> None:
    here, there = pair
    endpoint = f"tcp://{here.address}:{free_ports('0.0.0.0', 3)}"
    keys = ["--keys", str(folder / "keys")]
    flags = [*keys, "--worker-endpoint", endpoint, "--num-gpus", "2", "--checkpoint-every", "20"]
    server = start(*here.command(executable, "-m", "safelight", *generate(tiny_model, folder, "far", *flags)))
    run = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    joining = ["--scheduler", endpoint, *keys, "--device", "cpu", "--log-level", "info"]
    workers = start(*there.command(*run, *joining))
    server.until(at_step(70))
    os.kill(workers.rank(0), signal.SIGKILL)
    assert server.wait() == 0, server.output + workers.output
    assert workers.wait() == 0, workers.output
    assert encodings(server) == 2
    assert all(step > 40 for step in steps_back(server))
    assert "frames travel with their messages" in workers.output
    assert_equal(frames(folder, "far"), alone(start, tiny_model, folder))


def test_ctrl_c_leaves_no_process_and_no_folder(
    tiny_model: Path, folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder))
    command = generate(tiny_model, folder, "none", "--num-inference-steps", "1000")
    program = start(*torchrun("--standalone", "--nproc-per-node", "2"), *command)
    program.until(at_step(10))
    processes = program.pids()
    assert len(processes) == 5, "two ranks, the command, scheduler and output"
    program.process.send_signal(signal.SIGINT)
    assert program.wait(60) != 0
    assert not [pid for pid in processes if alive(pid)]
    assert {path.name for path in folder.iterdir() if path.name.startswith("safelight-")} == set()


def test_a_command_that_fails_ends_all_ranks_with_its_exit_code(start: Start) -> None:
    program = start(
        *torchrun("--standalone", "--nproc-per-node", "2"),
        "generate",
        "--device",
        "cpu",
        "--prompt",
        "a",
        "--height",
        "7",
    )
    assert program.wait(60) != 0
    assert "(exitcode: 2)" in program.output
    assert program.output.count("safelight: height must be") == 1, program.output
