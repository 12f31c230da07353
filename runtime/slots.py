"""Frame slots: fixed files of shared memory that carry decoded frames from workers to the output process.

A pool is a 0700 folder with `slot-<n>` files (0600) of one header page and `slot_bytes` of frames each, reserved in
full before anything starts, and an `owner` file that its creator keeps locked until it exits (an flock holds across
pid namespaces that share /dev/shm, a pid does not), so that later starts can sweep what a killed owner left. Plain
files and mmap: multiprocessing.shared_memory's tracker unlinks the segments of a process that died.

The scheduler's grant says who may write or read a slot. The header only proves that a slot holds the chunk that a
ChunkReady names: it is cleared before the frames are written and filled in after them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safelight.runtime.errors import ProtocolError, StartupError
from safelight.runtime.messages import ChunkReady, Decode, SlotPool

HEADER_BYTES = 4096  # one page, so that frames are page aligned
JOB_BYTES = 26  # a ULID
MAGIC = b"SLSLOT\r\n"
VERSION = 1
OWNER_FILE = "owner"
_OWNER_MARK = b"safelight slot pool\n"
_FIELDS = struct.Struct(f"<8sI{JOB_BYTES}s2x4QQI")
_CHECK = struct.Struct("<I")

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ChunkId:
    """Which frames a slot holds; no epoch, so that chunks outlive a restart of the scheduler."""

    job: str
    attempt: int
    index: int
    take: int
    chunk: int

    @classmethod
    def of(cls, message: ChunkReady | Decode) -> ChunkId:
        return cls(message.job, message.attempt, message.index, message.take, message.chunk)


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """`nbytes` and `crc32` are of the frames behind the header."""

    chunk: ChunkId
    nbytes: int
    crc32: int


def pack_header(header: SlotHeader) -> bytes:
    """Fixed little-endian fields and their own checksum. Raises ProtocolError for values that do not fit."""
    chunk = header.chunk
    job = chunk.job.encode()
    if len(job) != JOB_BYTES:
        raise ProtocolError(f"a slot's job id is a ULID of {JOB_BYTES} bytes, got {chunk.job!r}")
    numbers = (chunk.attempt, chunk.index, chunk.take, chunk.chunk, header.nbytes, header.crc32)
    try:
        fields = _FIELDS.pack(MAGIC, VERSION, job, *numbers)
    except struct.error as error:
        raise ProtocolError(f"slot header expected unsigned numbers, got {header}: {error}") from error
    return fields + _CHECK.pack(zlib.crc32(fields))


def unpack_header(data: bytes | memoryview) -> SlotHeader:
    """Inverse of `pack_header`; further bytes are ignored. Raises ProtocolError."""
    if len(data) < _FIELDS.size + _CHECK.size:
        raise ProtocolError(f"a slot header has {_FIELDS.size + _CHECK.size} bytes, got {len(data)}")
    magic, version, job, attempt, index, take, chunk, nbytes, crc32 = _FIELDS.unpack_from(data)
    (check,) = _CHECK.unpack_from(data, _FIELDS.size)
    if (magic, version) != (MAGIC, VERSION) or check != zlib.crc32(data[: _FIELDS.size]):
        raise ProtocolError("slot header refused: empty, half written, corrupt or of another version")
    try:
        return SlotHeader(ChunkId(job.decode(), attempt, index, take, chunk), nbytes, crc32)
    except UnicodeDecodeError as error:
        raise ProtocolError(f"slot header refused: its job id is not text: {job!r}") from error


def create_pool(folder: str | Path, count: int, slot_bytes: int) -> SlotPool:
    """Makes and reserves a pool that belongs to this process until it exits; sweeps stale pools beside it.

    The lock's descriptor is never closed on purpose: the kernel closes it with the process, however that ends.
    Raises StartupError when the folder exists or the memory is not there; nothing is left behind then.
    """
    folder = Path(folder).absolute()
    if count < 1 or slot_bytes < 1:
        raise StartupError(f"a slot pool needs at least one slot of one byte, got {count} of {slot_bytes}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep_stale_pools(folder.parent)
    need = count * (HEADER_BYTES + slot_bytes)
    free = os.statvfs(folder.parent)
    if need > free.f_bavail * free.f_frsize:
        raise _shortage(folder, count, need, free.f_bavail * free.f_frsize)
    pool = SlotPool(str(folder), count, slot_bytes)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise StartupError(f"cannot make the slot folder {folder}: {error}; is another server using it?") from error
    lock = os.open(folder / OWNER_FILE, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.write(lock, _OWNER_MARK)  # after the lock: a sweep leaves folders without the mark alone
    try:
        for slot in range(count):
            _reserve(_slot_path(pool, slot), HEADER_BYTES + slot_bytes)
    except OSError as error:
        remove_pool(pool)
        os.close(lock)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
            raise StartupError(f"cannot reserve the frame slots in {folder}: {error}") from error
        raise _shortage(folder, count, need, free.f_bavail * free.f_frsize) from error
    return pool


def remove_pool(pool: SlotPool) -> None:
    """Deletes a pool's files and folder; processes that mapped them keep their memory until they exit."""
    _remove_folder(Path(pool.folder))


def sweep_stale_pools(parent: str | Path) -> list[Path]:
    """Removes the pools of this user in `parent` whose owner is gone, and returns their folders."""
    stale = []
    for owner in Path(parent).glob(f"*/{OWNER_FILE}"):
        if owner.parent.is_symlink() or not _is_abandoned(owner):
            continue
        _remove_folder(owner.parent)
        stale.append(owner.parent)
    return stale


class MappedPool:
    """All slots of a pool, mapped once (mapping each time costs four times the copy). Threads may share it.

    Raises StartupError when a slot's file is missing or of another size.
    """

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._maps: list[mmap.mmap] = []
        for slot in range(pool.count):
            path = _slot_path(pool, slot)
            try:
                with open(path, "r+b") as file:
                    self._maps.append(mmap.mmap(file.fileno(), HEADER_BYTES + pool.slot_bytes))
            except (OSError, ValueError) as error:
                raise StartupError(f"cannot map slot file {path} of {pool.slot_bytes} bytes: {error}") from error

    def write_chunk(self, slot: int, chunk: ChunkId, frames: Bytes) -> int:
        """Copies uint8 frames of any shape behind a fresh header; returns their crc32 (in C order).

        Raises ProtocolError when they do not fit, or the slot does not exist.
        """
        mapped = self._map(slot, frames.nbytes)
        mapped[: len(MAGIC)] = bytes(len(MAGIC))
        target = np.frombuffer(mapped, np.uint8, frames.nbytes, HEADER_BYTES)
        np.copyto(target.reshape(frames.shape), frames, casting="no")
        crc32 = zlib.crc32(target.data)
        header = pack_header(SlotHeader(chunk, frames.nbytes, crc32))
        mapped[: len(header)] = header
        return crc32

    def read_chunk(self, slot: int, chunk: ChunkId, nbytes: int, crc32: int) -> Bytes:
        """A flat copy of the slot's frames, verified after copying. Raises ProtocolError when it is not that chunk."""
        mapped = self._map(slot, nbytes)
        expected = SlotHeader(chunk, nbytes, crc32)
        found = unpack_header(mapped[: _FIELDS.size + _CHECK.size])
        if found != expected:
            raise ProtocolError(f"slot {slot} expected to hold {expected}, holds {found}")
        frames = np.frombuffer(mapped, np.uint8, nbytes, HEADER_BYTES).copy()
        if zlib.crc32(frames.data) != crc32:
            raise ProtocolError(f"the frames of {chunk} in slot {slot} do not match their checksum {crc32:#010x}")
        return frames

    def close(self) -> None:
        for mapped in self._maps:
            mapped.close()

    def _map(self, slot: int, nbytes: int) -> mmap.mmap:
        if not 0 <= slot < self._pool.count:
            raise ProtocolError(f"slot expected to be 0 to {self._pool.count - 1}, got {slot}")
        if not 0 < nbytes <= self._pool.slot_bytes:
            raise ProtocolError(f"a slot takes 1 to {self._pool.slot_bytes} bytes of frames, got {nbytes}")
        return self._maps[slot]


def _slot_path(pool: SlotPool, slot: int) -> Path:
    return Path(pool.folder) / f"slot-{slot}"


def _reserve(path: Path, nbytes: int) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    finally:
        os.close(descriptor)


def _shortage(folder: Path, count: int, need: int, free: int) -> StartupError:
    return StartupError(
        f"{count} frame slots need {need / 2**20:,.0f} MiB in {folder.parent}, where {free / 2**20:,.0f} MiB are free: "
        "free some, enlarge it (for containers --shm-size), or use fewer or smaller slots"
    )


def _is_abandoned(owner: Path) -> bool:
    """Whether this owner file is ours, complete, and locked by nobody."""
    try:
        descriptor = os.open(owner, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # another user's, or just removed
        return False
    try:
        if os.fstat(descriptor).st_uid != os.geteuid() or os.read(descriptor, 64) != _OWNER_MARK:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _remove_folder(folder: Path) -> None:
    """Deletes slots, then the owner file, then the folder; what another sweep deleted first is fine."""
    with contextlib.suppress(FileNotFoundError):
        for path in [*folder.glob("slot-*"), folder / OWNER_FILE]:
            path.unlink(missing_ok=True)
        folder.rmdir()
