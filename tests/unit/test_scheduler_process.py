"""The scheduler's process on real sockets: a toy worker, output and client in this process talk to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from safelight.runtime import messages as m
from safelight.runtime import transport
from safelight.runtime.scheduler.journal import Journal
from safelight.runtime.scheduler.main import Profiler, _sweep_checkpoints

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "runtime" / "models" / "builtin_model"
CHILD = """
import os, sys, msgspec
from safelight.runtime.errors import StartupError
from safelight.runtime.messages import SchedulerSpec
from safelight.runtime.scheduler.main import main
try:
    main(msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=SchedulerSpec), parent_fd=0)
except StartupError as error:
    raise SystemExit(error.message) from None
"""
FIRST, SECOND = "01J" + "A" * 23, "01J" + "B" * 23
REQUEST = m.GenerationRequest(
    "a red apple", "", {"prompt": (1, 2)}, 64, 64, 1, 8, 3, 3.0, 0, 1, "unipc", m.MediaSpec(m.MediaFormat.PNG)
)


class Peers:
    """The scheduler's child process and everyone it talks to."""

    def __init__(self, folder: Path, context: zmq.Context[Any]) -> None:
        names = ("submit", "plans", "decisions", "chunks", "events", "control")
        self.ends = m.Endpoints(*(f"ipc://{folder}/{name}" for name in names))
        self.spec = m.SchedulerSpec(
            self.ends, str(folder / "journal.db"), str(folder), str(MODEL), 1, 1, m.SlotPool(str(folder), 2, 1 << 24),
            "fair", 10, None, 0, "warning",
        )  # fmt: skip
        self.control = transport.bind_router(context, self.ends.control, m.FromControlled)
        self.client = transport.connect_dealer(context, self.ends.submit, m.FromScheduler)
        self.raw = context.socket(zmq.DEALER)
        self.raw.connect(self.ends.submit)
        identity = transport.worker_identity(0, 0, 0)
        self.worker = transport.connect_dealer(context, self.ends.plans, m.ToWorker, identity)
        self.output = transport.connect_dealer(context, self.ends.decisions, m.ToOutput, transport.OUTPUT_IDENTITY)
        self.channels = (self.control, self.client, self.worker, self.output)
        self.chunks = len(Profiler(MODEL).profile_of(REQUEST).chunk_frames)
        self.received = self.done = self.received_epoch = -1
        self.held: set[m.HeldState] = set()
        self.replies: list[Any] = []
        self.published: list[m.Publish] = []
        self.plans: list[m.Plan] = []
        self.answering = True
        self.beat = 0.0
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CHILD, msgspec.msgpack.encode(self.spec).hex()]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def until(self, happened: Any, seconds: float = 30.0) -> None:
        """Plays everyone's part until `happened()`."""
        end = time.monotonic() + seconds
        poller = zmq.Poller()
        for channel in self.channels:
            poller.register(channel.socket, zmq.POLLIN)
        while not happened():
            assert time.monotonic() < end, (self.replies, self.plans, self.published)
            if time.monotonic() > self.beat:
                self.beat = time.monotonic() + 0.2
                self.worker.send(
                    m.Heartbeat(0, 0, 1, 0, 1, True, self.received_epoch, self.received, self.done),
                )
                self.output.send(m.OutputHello("out", 1))
            poller.poll(50)
            self.replies += [r.message for r in self.control.receive_all()] + [
                r.message for r in self.client.receive_all()
            ]
            for received in self.worker.receive_all():
                self.work(received.message)
            for received in self.output.receive_all():
                if isinstance(received.message, m.OutputReset):
                    self.output.send(m.OutputReady("out", received.message.scheduler_epoch))
                elif isinstance(received.message, m.Publish):
                    self.published.append(received.message)

    def work(self, message: m.ToWorker) -> None:
        if isinstance(message, m.InventoryRequest):
            self.worker.send(m.Ready(0, 0, 1, 0, 10**12, 0, 0, "cpu"))
            place = (self.received_epoch, self.received, self.done)
            self.worker.send(m.Inventory(message.scheduler_epoch, 0, 0, 0, *place, tuple(self.held)))
        elif isinstance(message, m.Plan):
            self.plans.append(message)
            self.received_epoch, self.received = message.scheduler_epoch, message.number
            if self.answering:
                self.answer(message)

    def answer(self, plan: m.Plan) -> None:
        self.done = plan.number
        results = tuple(self.result(op) for op in plan.ops)
        self.worker.send(m.PlanDone(plan.scheduler_epoch, 0, 0, 0, plan.number, results))

    def result(self, op: m.Op) -> m.OpResult:
        if not isinstance(op, m.Decode):
            return m.OpResult(ms=1.0)
        last = op.chunk + 1 == self.chunks
        self.output.send(m.SlotReleased(op.slot, op.job, op.attempt, op.index, op.take, op.chunk))
        if last:
            artifact = m.Artifact(op.index, "/file.png", "image/png", 1, "0")
            self.output.send(m.ArtifactCommitted(op.job, op.attempt, op.take, artifact))
        return m.OpResult(ms=1.0, last_chunk=last, frames=1)

    def submit(self, job: str) -> None:
        self.client.send(m.Submit(job, "me", REQUEST, attached=False))


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    context: zmq.Context[Any] = zmq.Context()
    everyone = Peers(tmp_path, context)
    yield everyone
    everyone.stop()
    for channel in everyone.channels:
        channel.close()
    everyone.raw.close(0)
    context.term()


def test_a_job_runs_over_real_sockets_and_survives_a_kill_of_the_scheduler(peers: Peers) -> None:
    peers.submit(FIRST)
    peers.until(lambda: peers.published)
    assert peers.published[0].status == m.Status.COMPLETED
    assert any(isinstance(r, m.Accepted) for r in peers.replies)
    assert any(isinstance(r, m.ControlHeartbeat) for r in peers.replies)

    peers.answering = False
    peers.submit(SECOND)
    peers.until(lambda: any(isinstance(op, m.Encode) and op.job == SECOND for p in peers.plans for op in p.ops))
    peers.stop()
    for plan in peers.plans:
        peers.done = plan.number
    peers.answering, peers.published = True, []
    peers.process = peers.start()
    peers.until(lambda: any(p.job == SECOND for p in peers.published))
    # told again because output was reset, and not different
    assert {p.job: p.status for p in peers.published} == {FIRST: m.Status.COMPLETED, SECOND: m.Status.COMPLETED}


def test_malformed_frames_are_dropped_and_refusals_name_the_parameter(peers: Peers) -> None:
    peers.until(lambda: any(isinstance(r, m.ControlHeartbeat) for r in peers.replies))
    for junk in ([b""], [b"SL1\x00junk"], [b"x" * 100, b"y"], [transport.encode(m.QueryStatus())[:-1] + b"\xff"]):
        peers.raw.send_multipart(junk)
    bad = msgspec.structs.replace(REQUEST, num_inference_steps=0)
    peers.client.send(m.Submit(FIRST, "me", bad))
    peers.until(lambda: any(isinstance(r, m.Refused) for r in peers.replies))
    (refused,) = [r for r in peers.replies if isinstance(r, m.Refused)]
    assert (refused.error.code, refused.error.param) == ("invalid_request", "num_inference_steps")
    peers.submit(SECOND)
    peers.until(lambda: peers.published)


def test_a_checkpoint_that_is_not_here_is_not_journalled_and_warned_of_once(peers: Peers, tmp_path: Path) -> None:
    peers.answering = False
    peers.submit(FIRST)
    peers.until(lambda: peers.plans)
    here = tmp_path / f"{FIRST}-0-0-1.safetensors"
    here.touch()
    for path, step in ((here, 1), (Path("/elsewhere/a"), 2), (Path("/elsewhere/b"), 3)):
        ref = m.CheckpointRef(str(path), step, "0")
        peers.worker.send(m.CheckpointCommitted(0, 0, FIRST, 0, 0, ref))
    told = len([r for r in peers.replies if isinstance(r, m.ControlHeartbeat)])
    peers.until(lambda: len([r for r in peers.replies if isinstance(r, m.ControlHeartbeat)]) > told + 1)
    peers.process.kill()
    _, said = peers.process.communicate()
    assert said.count(b"let --state-dir name a folder") == 1
    journal = Journal(Path(peers.spec.journal), lambda: None)
    (history,) = journal.recovered.histories
    journal.close()
    assert history.checkpoint is not None
    assert history.checkpoint.ref.path == str(here)


def test_input_pictures_that_no_open_job_has_are_deleted(peers: Peers, tmp_path: Path) -> None:
    peers.stop()
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    old, fresh = inputs / f"{'a' * 64}.png", inputs / f"{'b' * 64}.png"
    fresh.touch()
    old.touch()
    os.utime(old, (0, 0))
    peers.spec = msgspec.structs.replace(peers.spec, input_dir=str(inputs))
    peers.process = peers.start()
    peers.until(lambda: not old.exists())
    assert fresh.exists()


def test_it_ends_at_shutdown_and_when_its_parent_is_gone(peers: Peers) -> None:
    peers.until(lambda: any(isinstance(r, m.ControlHeartbeat) for r in peers.replies))
    peers.control.send(m.Shutdown("test"), transport.SCHEDULER_IDENTITY)
    assert peers.process.wait(10) == 0
    peers.stop()
    peers.process = peers.start()
    assert peers.process.stdin is not None
    peers.process.stdin.close()
    assert peers.process.wait(10) == 0


def test_a_start_deletes_the_checkpoints_of_jobs_that_are_not_open(tmp_path: Path) -> None:
    for name in (f"{FIRST}-0-0-20", f"{SECOND}-0-0-20"):
        (tmp_path / f"{name}.safetensors").touch()
        (tmp_path / f".{name}.safetensors.tmp").touch()
    _sweep_checkpoints(tmp_path, {FIRST})
    assert {p.name for p in tmp_path.iterdir()} == {f"{FIRST}-0-0-20.safetensors", f".{FIRST}-0-0-20.safetensors.tmp"}


def test_a_second_scheduler_on_the_same_journal_says_so(peers: Peers) -> None:
    peers.until(lambda: any(isinstance(r, m.ControlHeartbeat) for r in peers.replies))
    second = peers.start()
    assert second.wait(20) == 1
    _, said = second.communicate()
    assert b"in use by another server" in said


def test_the_scheduler_never_imports_torch() -> None:
    code = (
        "import sys, safelight.runtime.scheduler.main\n"
        "print(sorted({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
