"""Slot headers, pools and the chunks in them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.runtime import slots
from safelight.runtime.errors import ProtocolError, StartupError
from safelight.runtime.messages import SlotPool
from safelight.runtime.slots import ChunkId, MappedPool, SlotHeader

JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
CHUNK = ChunkId(JOB, attempt=1, index=2, take=3, chunk=4)
_u64 = st.integers(0, 2**64 - 1)
_headers = st.builds(
    SlotHeader,
    chunk=st.builds(
        ChunkId,
        job=st.text("0123456789ABCDEFGHJKMNPQRSTVWXYZ", min_size=26, max_size=26),
        attempt=_u64,
        index=_u64,
        take=_u64,
        chunk=_u64,
    ),
    nbytes=_u64,
    crc32=st.integers(0, 2**32 - 1),
)


def frames_of(seed: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 32, 3), dtype=np.uint8)


@given(_headers, st.binary(max_size=8))
def test_header_round_trips_whatever_follows_it(header: SlotHeader, rest: bytes) -> None:
    assert slots.unpack_header(slots.pack_header(header) + rest) == header


@given(_headers, st.data())
def test_header_with_any_byte_changed_or_missing_is_refused(header: SlotHeader, data: st.DataObject) -> None:
    packed = bytearray(slots.pack_header(header))
    place = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ProtocolError):
        slots.unpack_header(bytes(packed[:place]))
    packed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError):
        slots.unpack_header(bytes(packed))


@pytest.mark.parametrize(
    "chunk", [ChunkId("short", 0, 0, 0, 0), ChunkId(JOB, -1, 0, 0, 0), ChunkId(JOB, 0, 0, 0, 2**64)]
)
def test_header_refuses_values_that_do_not_fit(chunk: ChunkId) -> None:
    with pytest.raises(ProtocolError):
        slots.pack_header(SlotHeader(chunk, 1, 1))


def test_chunk_written_by_one_mapping_is_read_by_another(tmp_path: Path) -> None:
    pool = slots.create_pool(tmp_path / "pool", 2, 8192)
    writer, reader, frames = MappedPool(pool), MappedPool(pool), frames_of(0)
    crc = writer.write_chunk(1, CHUNK, frames)
    assert np.array_equal(reader.read_chunk(1, CHUNK, frames.nbytes, crc), frames.reshape(-1))
    turned = frames.transpose(0, 2, 1, 3)  # not contiguous
    crc = writer.write_chunk(1, CHUNK, turned)
    assert np.array_equal(reader.read_chunk(1, CHUNK, frames.nbytes, crc).reshape(turned.shape), turned)
    writer.close()
    reader.close()


def test_chunk_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    pool = slots.create_pool(tmp_path / "pool", 2, 8192)
    mapped, frames = MappedPool(pool), frames_of(0)
    crc = mapped.write_chunk(0, CHUNK, frames)
    for slot, chunk, nbytes, crc32 in [
        (1, CHUNK, frames.nbytes, crc),  # never written
        (0, ChunkId(JOB, 1, 2, 2, 4), frames.nbytes, crc),
        (0, CHUNK, frames.nbytes - 1, crc),
        (0, CHUNK, frames.nbytes, crc ^ 1),
        (2, CHUNK, frames.nbytes, crc),
        (-1, CHUNK, frames.nbytes, crc),
        (0, CHUNK, 10**9, crc),
    ]:
        with pytest.raises(ProtocolError):
            mapped.read_chunk(slot, chunk, nbytes, crc32)
    with open(tmp_path / "pool" / "slot-0", "r+b") as file:
        file.seek(slots.HEADER_BYTES + 77)
        file.write(bytes([frames.reshape(-1)[77] ^ 1]))
    with pytest.raises(ProtocolError, match="checksum"):
        mapped.read_chunk(0, CHUNK, frames.nbytes, crc)


def test_chunk_larger_than_a_slot_is_refused(tmp_path: Path) -> None:
    mapped = MappedPool(slots.create_pool(tmp_path / "pool", 1, 100))
    with pytest.raises(ProtocolError, match="1 to 100 bytes"):
        mapped.write_chunk(0, CHUNK, frames_of(0))


def test_pool_is_private_and_reserved_in_full(tmp_path: Path) -> None:
    pool = slots.create_pool(tmp_path / "deep" / "pool", 3, 1 << 20)
    folder = Path(pool.folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for slot in range(3):
        status = (folder / f"slot-{slot}").stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_size == slots.HEADER_BYTES + (1 << 20)
        assert status.st_blocks * 512 >= status.st_size
    slots.remove_pool(pool)
    assert not folder.exists()
    slots.remove_pool(pool)


def test_shortage_is_a_startup_error_with_the_figures_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"4 frame slots need [\d,]+ MiB in .* where [\d,]+ MiB are free"):
        slots.create_pool(tmp_path / "pool", 4, 1 << 50)
    assert list(tmp_path.iterdir()) == []


def test_shortage_found_while_reserving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.posix_fallocate, []

    def second_fails(descriptor: int, offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", second_fails)
    with pytest.raises(StartupError, match="4 frame slots need"):
        slots.create_pool(tmp_path / "pool", 4, 1000)
    assert list(tmp_path.iterdir()) == []


def test_taken_folder_and_missing_slots_are_startup_errors(tmp_path: Path) -> None:
    pool = slots.create_pool(tmp_path / "pool", 1, 100)
    with pytest.raises(StartupError, match="another server"):
        slots.create_pool(tmp_path / "pool", 1, 100)
    with pytest.raises(StartupError, match="slot-1"):
        MappedPool(SlotPool(pool.folder, 2, 100))
    with pytest.raises(StartupError, match="slot-0"):
        MappedPool(SlotPool(pool.folder, 1, 10_000))


def test_sweep_removes_pools_of_killed_owners_only(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from safelight.runtime import slots;"
        "slots.create_pool(sys.argv[1], 2, 100); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "dead")], check=False)
    assert (tmp_path / "dead" / "slot-1").exists()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "owner").write_text("somebody else")
    mine = slots.create_pool(tmp_path / "mine", 1, 100)  # sweeps
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "mine"]
    assert slots.sweep_stale_pools(tmp_path) == []
    assert MappedPool(mine).write_chunk(0, CHUNK, np.zeros(100, np.uint8))
