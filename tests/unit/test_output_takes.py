"""Chunks to artifacts: order, stale takes, faults, drops and resets, without sockets."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from PIL import Image

from safelight.runtime import slots
from safelight.runtime.errors import ProtocolError
from safelight.runtime.messages import (
    Artifact,
    ArtifactCommitted,
    ArtifactFailed,
    ChunkReady,
    FromOutput,
    MediaFormat,
    MediaSpec,
    OpenJob,
    OpenTake,
    OutputDropped,
    OutputReady,
    SlotReleased,
)
from safelight.runtime.output import media
from safelight.runtime.output.artifacts import ArtifactStore
from safelight.runtime.output.takes import Takes
from safelight.runtime.slots import ChunkId, MappedPool

JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
OTHER = "01BX5ZZKBKACTAV9WEVGEMMVRZ"
HEIGHT, WIDTH = 32, 48
M = TypeVar("M", bound=FromOutput)


class Bench:
    """A Takes with slots, a worker's hand that fills them, and everything that was sent to the scheduler."""

    def __init__(self, folder: Path) -> None:
        self.sent: list[FromOutput] = []
        self.woken = threading.Semaphore(0)
        self.slots = MappedPool(slots.create_pool(folder / "slots", 8, 4 * HEIGHT * WIDTH * 3))
        self.artifacts = folder / "artifacts"
        pool = ThreadPoolExecutor(2)
        self.takes = Takes(self.slots, ArtifactStore(self.artifacts), pool, self.sent.append, self.woken.release)

    def open(self, job: str = JOB, format: MediaFormat = MediaFormat.NPY, frames: int = 4, **spec: Any) -> None:
        self.takes.open_job(OpenJob(job, "me", MediaSpec(format, **spec), 16, frames, HEIGHT, WIDTH, 2))

    def take(self, job: str = JOB, attempt: int = 0, index: int = 0, take: int = 0) -> None:
        self.takes.open_take(OpenTake(job, attempt, index, take))

    def chunk(
        self, slot: int, chunk: int, frames: np.ndarray, last: bool = False, send: bool = True, **place: Any
    ) -> ChunkReady:
        at = msgspec.convert({"job": JOB, "attempt": 0, "index": 0, "take": 0, "chunk": chunk} | place, ChunkId)
        crc = self.slots.write_chunk(slot, at, frames)
        count, height, width, _ = frames.shape
        ready = ChunkReady(
            at.job, at.attempt, at.index, at.take, chunk, last, slot, count, height, width, frames.nbytes, crc
        )
        if send:
            self.takes.chunk(ready)
        return ready

    def wait(self, kind: type[M], count: int = 1) -> list[M]:
        """All messages of a kind once there are `count`."""
        while len(found := self.of(kind)) < count:
            assert self.woken.acquire(timeout=30), f"waited for {kind.__name__}, got {self.sent}"
            self.takes.collect()
        return found

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in self.sent if isinstance(message, kind)]

    def files(self) -> list[str]:
        return sorted(path.name for path in self.artifacts.iterdir())


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.takes.close()
    bench.slots.close()


class Gate:
    """An encoder that waits in `add` until it is let go."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, path: Path, format: MediaFormat, job: OpenJob) -> Gate:
        self.path = path
        return self

    def add(self, frames: media.Frames) -> None:
        self.entered.release()
        assert self.go.acquire(timeout=30)

    def finish(self) -> None:
        self.path.write_bytes(b"done")

    def abort(self) -> None:
        pass


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr("safelight.runtime.output.writer.open_encoder", gate)
    return gate


def pixels(seed: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_chunks_become_one_artifact_and_release_their_slots_in_order(bench: Bench) -> None:
    bench.open()
    bench.take(attempt=3, index=1)
    first, second = pixels(1), pixels(2)
    bench.chunk(0, 0, first, attempt=3, index=1)
    bench.chunk(1, 1, second, last=True, attempt=3, index=1)
    (committed,) = bench.wait(ArtifactCommitted)
    assert bench.of(SlotReleased) == [SlotReleased(0, JOB, 3, 1, 0, 0), SlotReleased(1, JOB, 3, 1, 0, 1)]
    assert (committed.job, committed.attempt, committed.take, committed.artifact.index) == (JOB, 3, 0, 1)
    assert np.array_equal(np.load(committed.artifact.path), np.concatenate([first, second]))
    assert bench.files() == [f"{JOB}-3-1.npy"]
    assert Path(committed.artifact.path).stat().st_size == committed.artifact.nbytes


def test_an_npy_output_with_frames_is_one_file_and_named_once(bench: Bench) -> None:
    bench.open(format=MediaFormat.NPY, frames=1, with_frames=True)
    bench.take()
    bench.chunk(0, 0, np.zeros((1, HEIGHT, WIDTH, 3), np.uint8), last=True)
    [committed] = bench.wait(ArtifactCommitted)
    assert committed.artifact.frames_path is None
    assert [path.name for path in bench.artifacts.iterdir()] == [Path(committed.artifact.path).name]


def test_with_frames_writes_both_files(bench: Bench) -> None:
    bench.open(format=MediaFormat.PNG, frames=1, with_frames=True)
    bench.take()
    frames = pixels(1, 1)
    bench.chunk(0, 0, frames, last=True)
    (committed,) = bench.wait(ArtifactCommitted)
    assert committed.artifact.frames_path is not None
    assert np.array_equal(np.load(committed.artifact.frames_path), frames)
    with Image.open(committed.artifact.path) as image:
        assert np.array_equal(np.asarray(image), frames[0])
    bench.takes.publish(JOB, [committed.artifact])
    assert bench.files() == [f"{JOB}-0-0.npy", f"{JOB}-0-0.png"]


def test_jobs_and_outputs_interleave(bench: Bench) -> None:
    places = [(job, index) for job in (JOB, OTHER) for index in (0, 1)]
    for job in (JOB, OTHER):
        bench.open(job)
    for job, index in places:
        bench.take(job, index=index)
    for part in (0, 1):
        for number, (job, index) in enumerate(places):
            bench.chunk(2 * number + part, part, pixels(2 * number + part), part == 1, job=job, index=index)
    found = {(c.job, c.artifact.index): np.load(c.artifact.path) for c in bench.wait(ArtifactCommitted, 4)}
    for number, place in enumerate(places):
        assert np.array_equal(found[place], np.concatenate([pixels(2 * number), pixels(2 * number + 1)]))


def test_frames_of_a_remote_worker_come_with_the_message(bench: Bench) -> None:
    bench.open()
    bench.take()
    data = pixels(1, 4)
    ready = ChunkReady(JOB, 0, 0, 0, 0, True, 3, 4, HEIGHT, WIDTH, data.nbytes, zlib.crc32(data.tobytes()), remote=True)
    bench.takes.chunk(ready, (memoryview(data.tobytes()),))
    (committed,) = bench.wait(ArtifactCommitted)
    assert np.array_equal(np.load(committed.artifact.path), data)
    assert bench.of(SlotReleased) == [SlotReleased(3, JOB, 0, 0, 0, 0)]


@pytest.mark.parametrize("parts", [(), (b"short",), (b"x" * 4 * HEIGHT * WIDTH * 3,), (b"", b"")])
def test_remote_frames_that_do_not_match_fail_the_take(bench: Bench, parts: tuple[bytes, ...]) -> None:
    bench.open()
    bench.take()
    ready = ChunkReady(JOB, 0, 0, 0, 0, True, 3, 4, HEIGHT, WIDTH, 4 * HEIGHT * WIDTH * 3, 1, remote=True)
    bench.takes.chunk(ready, tuple(memoryview(part) for part in parts))
    bench.wait(ArtifactFailed)
    assert len(bench.of(SlotReleased)) == 1


def test_stale_chunks_are_released_at_once_and_ignored(bench: Bench) -> None:
    bench.open()
    bench.take(attempt=1, take=2)
    for place in ({"attempt": 0, "take": 9}, {"attempt": 1, "take": 1}, {"attempt": 0, "index": 1}, {"job": OTHER}):
        bench.chunk(0, 0, pixels(0), **place)
    assert len(bench.of(SlotReleased)) == 4
    bench.chunk(0, 0, pixels(1, 4), last=True, attempt=1, take=2)
    (committed,) = bench.wait(ArtifactCommitted)
    assert np.array_equal(np.load(committed.artifact.path), pixels(1, 4))


def test_chunk_that_overtakes_its_take_waits_for_it(bench: Bench) -> None:
    bench.open()
    bench.chunk(0, 0, pixels(1, 4), last=True, take=1)
    bench.take()
    assert bench.sent == []
    bench.take(take=1)
    (committed,) = bench.wait(ArtifactCommitted)
    assert committed.take == 1


def test_newer_take_ends_the_older_one(bench: Bench) -> None:
    bench.open()
    bench.take()
    bench.chunk(0, 0, pixels(1))
    bench.take(take=1)
    bench.chunk(1, 1, pixels(2), last=True)
    bench.chunk(2, 0, pixels(3, 4), last=True, take=1)
    (committed,) = bench.wait(ArtifactCommitted)
    assert committed.take == 1
    assert np.array_equal(np.load(committed.artifact.path), pixels(3, 4))
    bench.take()  # stale itself
    bench.takes.publish(JOB, [committed.artifact])
    bench.takes.drop(JOB, 0)
    bench.wait(OutputDropped)
    assert bench.files() == [f"{JOB}-0-0.npy"]
    assert len(bench.of(SlotReleased)) == 3
    assert bench.of(ArtifactFailed) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"chunk": 1}, "chunk 0 is missing"),
        ({"frames": 5}, "expected 4 frames in all, got 5"),
        ({"last": True}, "expected 4 frames in all, got 2 and no more"),
        ({"frames": 0}, "expected 4 frames"),
        ({"width": 47}, "expected frames of 48x32, got 47x32"),
        ({"nbytes": 7}, "expected 9216 bytes, got 7"),
        ({"crc32": 1}, "expected to hold"),
        ({"slot": 5}, "empty"),
        ({"slot": 99}, "slot expected to be 0 to 7"),
        ({"slot": -2}, "slot expected to be 0 to 7"),
        ({"slot": -1}, "slot expected to be 0 to 7"),
        ({"remote": True}, "expected 1 extra message frames"),
    ],
)
def test_wrong_chunk_fails_its_take_and_no_other(bench: Bench, fault: dict[str, Any], message: str) -> None:
    bench.open()
    bench.open(OTHER)
    bench.take()
    bench.take(OTHER)
    ready = msgspec.structs.replace(bench.chunk(0, 0, pixels(1), send=False), **fault)
    bench.takes.chunk(ready)
    (failed,) = bench.wait(ArtifactFailed)
    assert message in failed.error.message
    assert failed.error.code == "protocol_error"
    assert len(bench.of(SlotReleased)) == 1
    bench.chunk(2, 2, pixels(1), last=True)
    assert len(bench.of(SlotReleased)) == 2
    bench.chunk(1, 0, pixels(2, 4), last=True, job=OTHER)
    assert bench.wait(ArtifactCommitted)[0].job == OTHER
    assert bench.files() == [f"{OTHER}-0-0.npy"]
    assert len(bench.of(ArtifactFailed)) == 1


def test_corrupted_slot_fails_the_take(bench: Bench, tmp_path: Path) -> None:
    bench.open()
    bench.take()
    ready = bench.chunk(3, 0, pixels(1), send=False)
    with open(tmp_path / "slots" / "slot-3", "r+b") as file:
        file.seek(slots.HEADER_BYTES + 1000)
        file.write(b"\x00\x01\x02\x03")
    bench.takes.chunk(ready)
    (failed,) = bench.wait(ArtifactFailed)
    assert "checksum" in failed.error.message
    assert len(bench.of(SlotReleased)) == 1


def test_repeated_chunk_is_ignored(bench: Bench) -> None:
    bench.open()
    bench.take()
    ready = bench.chunk(0, 0, pixels(1))
    bench.takes.chunk(ready)
    bench.chunk(1, 1, pixels(2), last=True)
    (committed,) = bench.wait(ArtifactCommitted)
    assert len(np.load(committed.artifact.path)) == 4
    assert len(bench.of(SlotReleased)) == 2


def test_full_disk_fails_the_artifact_and_the_process_lives_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = media.NpyEncoder.add

    def full(self: media.NpyEncoder, frames: media.Frames) -> None:
        raise OSError(28, "No space left on device")

    bench.open()
    bench.take()
    monkeypatch.setattr(media.NpyEncoder, "add", full)
    bench.chunk(0, 0, pixels(1))
    (failed,) = bench.wait(ArtifactFailed)
    assert failed.error.message == "output 0 could not be written as npy: [Errno 28] No space left on device"
    assert failed.error.code == "job_failed"
    monkeypatch.setattr(media.NpyEncoder, "add", real)
    bench.take(take=1)
    bench.chunk(0, 0, pixels(1, 4), last=True, take=1)
    bench.wait(ArtifactCommitted)
    bench.takes.drop(JOB, 0)
    bench.wait(OutputDropped)
    assert bench.files() == [f"{JOB}-0-0.npy"]


def test_rename_that_fails_is_an_artifact_that_failed(bench: Bench) -> None:
    bench.open(format=MediaFormat.PNG, frames=1, with_frames=True)
    (bench.artifacts / f"{JOB}-0-0.png").mkdir()  # in the way of the second of two files
    bench.take()
    bench.chunk(0, 0, pixels(1, 1), last=True)
    (failed,) = bench.wait(ArtifactFailed)
    assert "Is a directory" in failed.error.message
    bench.takes.publish(JOB, [])
    bench.takes.drop(JOB, 0)
    bench.wait(OutputDropped)
    assert bench.files() == [f"{JOB}-0-0.png"]


def test_several_frames_to_png_fail_with_advice(bench: Bench) -> None:
    bench.open(format=MediaFormat.PNG)
    bench.take()
    bench.chunk(0, 0, pixels(1))
    (failed,) = bench.wait(ArtifactFailed)
    assert "ask for mp4" in failed.error.message
    assert failed.error.code == "invalid_request"
    assert bench.files() == []


def test_drop_while_encoding_is_answered_when_the_slot_is_free(bench: Bench, gate: Gate) -> None:
    bench.open()
    bench.take()
    bench.chunk(0, 0, pixels(1))
    bench.chunk(1, 1, pixels(2), last=True)
    assert gate.entered.acquire(timeout=30)
    bench.takes.drop(JOB, 0)
    assert bench.sent == [SlotReleased(1, JOB, 0, 0, 0, 1)]
    gate.go.release()
    bench.wait(OutputDropped)
    assert bench.sent[1:] == [SlotReleased(0, JOB, 0, 0, 0, 0), OutputDropped(JOB, 0)]
    assert bench.files() == []
    bench.take()  # of the dropped attempt
    bench.chunk(0, 2, pixels(1))
    assert bench.sent[-1] == SlotReleased(0, JOB, 0, 0, 0, 2)


def test_drop_of_what_is_unknown_is_answered_at_once(bench: Bench) -> None:
    bench.takes.drop(OTHER, 7)
    assert bench.sent == [OutputDropped(OTHER, 7)]


def test_drop_releases_chunks_that_wait_for_their_take(bench: Bench) -> None:
    bench.open()
    bench.chunk(0, 0, pixels(1))
    bench.chunk(1, 0, pixels(1), attempt=1)
    bench.takes.drop(JOB, 0)
    assert bench.sent == [SlotReleased(0, JOB, 0, 0, 0, 0), OutputDropped(JOB, 0)]


def test_reset_abandons_open_takes_keeps_files_and_answers_last(bench: Bench, gate: Gate) -> None:
    bench.open()
    bench.take()
    bench.take(index=1)
    gate.go.release()
    bench.chunk(0, 0, pixels(1, 4), last=True)
    bench.wait(ArtifactCommitted)
    assert gate.entered.acquire(timeout=30)
    bench.chunk(1, 0, pixels(1), index=1)
    assert gate.entered.acquire(timeout=30)
    bench.takes.reset(OutputReady("me", 4))
    bench.takes.reset(OutputReady("me", 5))
    assert bench.of(OutputReady) == []
    gate.go.release()
    bench.wait(OutputReady)
    assert bench.sent[-2:] == [SlotReleased(1, JOB, 0, 1, 0, 0), OutputReady("me", 5)]
    assert bench.files() == [f"{JOB}-0-0.npy"]
    gate.go.release()
    bench.open()
    bench.take(index=1)  # a new scheduler may count from anywhere
    bench.chunk(1, 0, pixels(1, 4), last=True, index=1)
    assert bench.wait(ArtifactCommitted, 2)[1].artifact.index == 1


def test_publish_deletes_what_is_not_listed(bench: Bench) -> None:
    bench.open()
    bench.take(attempt=1)
    bench.take(attempt=1, index=1)
    bench.chunk(0, 0, pixels(1, 4), last=True, attempt=1)
    (committed,) = bench.wait(ArtifactCommitted)
    bench.chunk(1, 0, pixels(1), attempt=1, index=1)
    for _ in range(2):
        bench.takes.publish(JOB, [committed.artifact])
    bench.takes.reset(OutputReady("me", 0))
    bench.wait(OutputReady)
    assert bench.files() == [f"{JOB}-1-0.npy"]
    bench.open(OTHER)
    bench.take(OTHER)
    bench.chunk(2, 0, pixels(1, 4), last=True, job=OTHER)
    bench.wait(ArtifactCommitted, 2)
    bench.takes.publish(OTHER, [Artifact(0, "/elsewhere/x.npy", "x", 1, "")])
    assert bench.files() == [f"{JOB}-1-0.npy"]


def test_publish_while_a_take_is_being_sealed_leaves_no_file(bench: Bench, gate: Gate) -> None:
    bench.open()
    bench.take()
    bench.chunk(0, 0, pixels(1, 4), last=True)
    assert gate.entered.acquire(timeout=30)
    bench.takes.publish(JOB, [])
    gate.go.release()
    bench.takes.drop(JOB, 0)
    bench.wait(OutputDropped)
    assert bench.of(ArtifactCommitted) == []
    assert bench.files() == []


def test_close_deletes_unfinished_files(bench: Bench) -> None:
    bench.open(format=MediaFormat.MP4, with_frames=True)
    bench.take()
    bench.chunk(0, 0, pixels(1))
    bench.wait(SlotReleased)
    assert len(bench.files()) == 2
    bench.takes.close()
    assert bench.files() == []


def test_decisions_that_no_scheduler_sends_are_protocol_errors(bench: Bench) -> None:
    with pytest.raises(ProtocolError, match="ULID"):
        bench.open("../../../../../../etc/pass")
    with pytest.raises(ProtocolError, match="OpenJob"):
        bench.take(OTHER)
