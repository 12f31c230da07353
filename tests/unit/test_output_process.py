"""The output process itself, between a fake scheduler, worker, supervisor and client on real sockets."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest
import zmq
from PIL import Image

from safelight.runtime import slots, transport
from safelight.runtime.messages import (
    ArtifactCommitted,
    ChunkReady,
    ControlHeartbeat,
    DropOutput,
    Endpoints,
    Event,
    FromControlled,
    FromEvents,
    FromOutput,
    MediaFormat,
    MediaSpec,
    OpenJob,
    OpenTake,
    OutputDropped,
    OutputHello,
    OutputReady,
    OutputReset,
    OutputSpec,
    PreviewMade,
    PreviewReady,
    Progress,
    Publish,
    Shutdown,
    SlotReleased,
    Stage,
    Status,
    Subscribe,
    TensorRef,
    ToChunks,
)
from safelight.runtime.slots import ChunkId, MappedPool

JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
OTHER = "01BX5ZZKBKACTAV9WEVGEMMVRZ"
HEIGHT, WIDTH = 64, 96
CHILD = """
import sys, msgspec
from safelight.runtime.messages import OutputSpec
from safelight.runtime.output.main import main
main(msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=OutputSpec))
assert "torch" not in sys.modules
"""


class Server:
    """All the neighbours of one output process."""

    def __init__(self, folder: Path, context: zmq.Context[Any]) -> None:
        self.folder, self.context = folder, context
        names = ("submit", "plans", "decisions", "chunks", "events", "control")
        self.endpoints = Endpoints(**{name: f"ipc://{folder}/{name}" for name in names})
        pool = slots.create_pool(folder / "slots", 4, 8 * HEIGHT * WIDTH * 3)
        self.spec = OutputSpec(self.endpoints, str(folder / "artifacts"), pool, 2, "info")
        self.slots = MappedPool(pool)
        self.decisions = transport.bind_router(context, self.endpoints.decisions, FromOutput)
        self.control = transport.bind_router(context, self.endpoints.control, FromControlled)
        self.worker = transport.connect_dealer(context, self.endpoints.chunks, ToChunks)
        self.client = transport.connect_dealer(context, self.endpoints.events, FromEvents)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", CHILD, msgspec.msgpack.encode(self.spec).hex()])

    def tell(self, message: msgspec.Struct) -> None:
        self.decisions.send(message, transport.OUTPUT_IDENTITY)

    def receive(self, channel: transport.Channel[Any], wanted: Callable[[Any], bool]) -> Any:
        """The first message that is wanted; those before it are dropped."""
        while channel.socket.poll(30_000):
            received = channel.receive()
            if received and wanted(received.message):
                return received.message
        raise AssertionError("nothing came within 30 s")

    def answer(self, kind: type[Any]) -> Any:
        return self.receive(self.decisions, lambda message: isinstance(message, kind))

    def chunk(self, slot: int, frames: np.ndarray, number: int = 0, last: bool = True, job: str = JOB) -> ChunkReady:
        crc = self.slots.write_chunk(slot, ChunkId(job, 0, 0, 0, number), frames)
        count, height, width, _ = frames.shape
        message = ChunkReady(job, 0, 0, 0, number, last, slot, count, height, width, frames.nbytes, crc)
        self.worker.send(message)
        return message

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for channel in (self.decisions, self.control, self.worker, self.client):
            channel.socket.close(0)
        self.slots.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with zmq.Context() as context:
        server = Server(tmp_path, context)
        try:
            yield server
        finally:
            server.close()


def opened(format: MediaFormat, frames: int, job: str = JOB) -> OpenJob:
    return OpenJob(job, "me", MediaSpec(format), 16, frames, HEIGHT, WIDTH, 1)


def scene(count: int) -> np.ndarray:
    frames = np.full((count, HEIGHT, WIDTH, 3), (20, 40, 200), np.uint8)
    frames[:, 16:48, 32:64] = (214, 32, 40)
    return frames


def test_job_goes_from_chunks_to_a_published_video(server: Server) -> None:
    hello = server.answer(OutputHello)
    assert hello.pid == server.process.pid
    beat = server.receive(server.control, lambda m: isinstance(m, ControlHeartbeat))
    assert (beat.role, beat.instance) == ("output", hello.instance)
    server.client.send(Subscribe(JOB, "me"))
    assert server.receive(server.client, lambda e: True) == Event(JOB, -1, known=False)
    server.tell(OutputReset(7))
    assert server.answer(OutputReady) == OutputReady(hello.instance, 7)
    server.tell(opened(MediaFormat.MP4, 10))
    server.tell(Progress(JOB, Stage.DENOISING, step=1, steps=2))
    server.tell(OpenTake(JOB, 0, 0, 0))
    for number, (count, last) in enumerate([(3, False), (4, False), (3, True)]):
        server.chunk(number, scene(count), number, last)
    for number in range(3):
        assert server.answer(SlotReleased) == SlotReleased(number, JOB, 0, 0, 0, number)
    artifact = server.answer(ArtifactCommitted).artifact
    server.tell(Publish(JOB, Status.COMPLETED, (artifact,)))
    events = [server.receive(server.client, lambda e: True) for _ in range(3)]
    assert [event.seq for event in events] == [0, 1, 2]
    assert [event.progress.stage for event in events[:2]] == [Stage.QUEUED, Stage.DENOISING]
    assert (events[2].status, events[2].artifacts) == (Status.COMPLETED, (artifact,))
    with av.open(artifact.path) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10


def test_previews_are_encoded_and_sent_before_the_end(server: Server) -> None:
    server.answer(OutputHello)
    server.tell(OutputReset(1))
    server.answer(OutputReady)
    server.tell(opened(MediaFormat.MP4, 10))
    server.client.send(Subscribe(JOB, "me"))
    assert server.receive(server.client, lambda e: True).progress.stage == Stage.QUEUED
    pixels = np.full((8, 12, 3), (20, 200, 40), np.uint8)
    ref = TensorRef(pixels.shape, "uint8", pixels.nbytes, zlib.crc32(pixels.data))
    for job, attempt, number, described in (
        (OTHER, 0, 0, ref), (JOB, 0, 0, msgspec.structs.replace(ref, crc32=1)), (JOB, 0, 0, ref), (JOB, 0, 1, ref),
    ):  # fmt: skip
        server.worker.send(PreviewReady(job, attempt, 0, number, 5, described), frames=(pixels.tobytes(),))
    for number in range(2):
        assert server.client.socket.poll(30_000)
        received = server.client.receive()
        assert received is not None
        made, (data,) = received.message, received.frames
        assert (type(made), made.job, made.number, made.seq, made.step) == (PreviewMade, JOB, number, number + 1, 5)
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == ("JPEG", (WIDTH, HEIGHT))
            assert np.abs(np.asarray(image).astype(int) - (20, 200, 40)).max() < 6
    server.tell(DropOutput(JOB, 0))  # the attempt is over: its previews are no news
    server.answer(OutputDropped)
    server.worker.send(PreviewReady(JOB, 0, 0, 2, 6, ref), frames=(pixels.tobytes(),))
    server.tell(Publish(JOB, Status.FAILED))
    assert server.receive(server.client, lambda e: True).status is Status.FAILED


def test_junk_on_every_socket_does_not_end_the_process(server: Server) -> None:
    server.answer(OutputHello)
    random = np.random.default_rng(0)
    for name in ("chunks", "events"):
        with server.context.socket(zmq.DEALER) as junk:
            junk.connect(getattr(server.endpoints, name))
            for size in range(50):
                junk.send_multipart([random.bytes(size), random.bytes(3)])
                junk.send(transport.encode(Shutdown("from a peer who may not say so")))
            junk.send_multipart([b""])
    for size in range(50):
        server.decisions.socket.send_multipart([transport.OUTPUT_IDENTITY, random.bytes(size)])
    server.tell(OpenTake(OTHER, 0, 0, 0))
    server.tell(opened(MediaFormat.PNG, 1, "no ulid"))
    server.tell(Publish("../..", Status.FAILED))
    server.tell(opened(MediaFormat.PNG, 1))
    server.tell(OpenTake(JOB, 0, 0, 0))
    server.worker.send(ChunkReady("?", -1, -1, -1, -1, True, 10**9, -5, -1, 0, -1, -1))
    assert server.answer(SlotReleased).job == "?"
    server.chunk(0, scene(1))
    with Image.open(server.answer(ArtifactCommitted).artifact.path) as image:
        assert np.array_equal(np.asarray(image), scene(1)[0])


def test_restarted_output_has_a_new_instance_keeps_files_and_sweeps_partials(server: Server) -> None:
    first = server.answer(OutputHello)
    server.tell(opened(MediaFormat.MP4, 8))
    server.tell(OpenTake(JOB, 0, 0, 0))
    server.chunk(0, scene(4), last=False)
    server.tell(opened(MediaFormat.NPY, 2, OTHER))
    server.tell(OpenTake(OTHER, 0, 0, 0))
    server.chunk(1, scene(2), job=OTHER)
    kept = server.answer(ArtifactCommitted).artifact
    files = server.folder / "artifacts"
    assert [path.name for path in files.iterdir() if path.suffix == ".partial"]
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    server.process = server.start()
    server.receive(server.decisions, lambda m: isinstance(m, OutputHello) and m.instance != first.instance)
    assert [str(path) for path in files.iterdir()] == [kept.path]
    server.tell(opened(MediaFormat.NPY, 2, OTHER))
    server.tell(Publish(OTHER, Status.COMPLETED, (kept,)))
    server.client.send(Subscribe(OTHER, "me", after_seq=99))
    assert server.receive(server.client, lambda e: e.status).artifacts == (kept,)


def test_restarted_scheduler_is_found_again(server: Server) -> None:
    hello = server.answer(OutputHello)
    server.decisions.socket.close(0)
    os.unlink(server.endpoints.decisions.removeprefix("ipc://"))
    server.decisions = transport.bind_router(server.context, server.endpoints.decisions, FromOutput)
    assert server.answer(OutputHello) == hello
    server.tell(OutputReset(2))
    assert server.answer(OutputReady) == OutputReady(hello.instance, 2)
    server.tell(DropOutput(JOB, 0))
    assert server.answer(OutputDropped) == OutputDropped(JOB, 0)


@pytest.mark.parametrize("by", ["supervisor", "scheduler"])
def test_shutdown_ends_the_process_and_leaves_no_partials(server: Server, by: str) -> None:
    server.answer(OutputHello)
    server.tell(opened(MediaFormat.MP4, 8))
    server.tell(OpenTake(JOB, 0, 0, 0))
    server.chunk(0, scene(4), last=False)
    server.answer(SlotReleased)
    if by == "supervisor":
        server.receive(server.control, lambda m: True)
        server.control.send(Shutdown("the test ends"), transport.OUTPUT_IDENTITY)
    else:
        server.tell(Shutdown("the test ends"))
    assert server.process.wait(30) == 0
    assert list((server.folder / "artifacts").iterdir()) == []


@pytest.mark.parametrize("cause", ["slots", "sockets", "artifacts"])
def test_what_is_missing_at_the_start_ends_the_process_with_the_reason(server: Server, cause: str) -> None:
    (server.folder / "file").touch()
    spec, replace = server.spec, msgspec.structs.replace
    wrong, message = {
        "slots": (replace(spec, slots=replace(spec.slots, count=9)), "cannot map slot file"),
        "sockets": (replace(spec, endpoints=replace(spec.endpoints, chunks="ipc:///no/folder")), "cannot listen on"),
        "artifacts": (replace(spec, artifact_dir=str(server.folder / "file")), "cannot use the artifact folder"),
    }[cause]
    arguments = [sys.executable, "-c", CHILD, msgspec.msgpack.encode(wrong).hex()]
    child = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert child.returncode == 1
    assert f"StartupError: {message}" in child.stderr
