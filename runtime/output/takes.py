"""Chunks to artifacts: one ordered lane per take, encoded in threads.

A lane is one (job, attempt, index, take). Its chunks are encoded one at a time in order, those of different lanes in
parallel, and a slot is released when its frames are encoded: slow encoding holds slots and so delays decodes, never
steps. All but the work given to the pool runs on the loop's thread, the final rename included, so that an aborted take
never puts a file in place.
"""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from safelight.runtime.errors import JobFailed, ProtocolError, SafelightError
from safelight.runtime.messages import (
    Artifact,
    ArtifactCommitted,
    ArtifactFailed,
    ChunkReady,
    ErrorInfo,
    FromOutput,
    OpenJob,
    OpenTake,
    OutputDropped,
    OutputReady,
    SlotReleased,
)
from safelight.runtime.output.artifacts import ArtifactStore, check_job_id
from safelight.runtime.output.writer import TakeWriter
from safelight.runtime.slots import Bytes, ChunkId, MappedPool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Chunk:
    message: ChunkReady
    frames: tuple[memoryview, ...]  # of a remote worker; otherwise they are in the slot


@dataclass(slots=True, eq=False)
class _Lane:
    take: OpenTake
    job: OpenJob
    writer: TakeWriter
    pending: deque[_Chunk] = field(default_factory=deque)
    next_chunk: int = 0
    frames: int = 0  # in the chunks accepted
    closed: bool = False  # finished, failed or aborted: nothing more is encoded
    busy: bool = False  # the pool works on it


@dataclass(slots=True)
class _Job:
    opened: OpenJob
    oldest: int = 0  # attempts before this one are dropped or superseded
    lanes: dict[int, _Lane] = field(default_factory=dict)  # index -> its newest take
    early: list[_Chunk] = field(default_factory=list)  # overtook their OpenTake


Then = Callable[[_Lane, BaseException | None], None]


class Takes:
    """All open takes. `send` gets the messages for the scheduler; `wake` is called, on any thread, to have `collect`
    called on the loop's thread. Closes the pool."""

    def __init__(
        self,
        slots: MappedPool,
        store: ArtifactStore,
        pool: ThreadPoolExecutor,
        send: Callable[[FromOutput], None],
        wake: Callable[[], None],
    ) -> None:
        self._slots = slots
        self._store = store
        self._pool = pool
        self._send = send
        self._wake = wake
        self._jobs: dict[str, _Job] = {}
        self._busy: set[_Lane] = set()
        self._done: deque[tuple[_Lane, BaseException | None, Then]] = deque()
        self._drops: list[OutputDropped] = []
        self._reset: OutputReady | None = None

    # ---- decisions

    def open_job(self, opened: OpenJob) -> None:
        """Opening again changes nothing. Raises ProtocolError for a job id that is no ULID."""
        check_job_id(opened.job)
        self._jobs.setdefault(opened.job, _Job(opened))

    def open_take(self, take: OpenTake) -> None:
        """Ends an earlier take of the same output. A stale one is ignored. Raises ProtocolError for an unknown job."""
        job = self._jobs.get(take.job)
        if job is None:
            raise ProtocolError(f"OpenTake expected after the job's OpenJob, got {take}")
        old = job.lanes.get(take.index)
        if take.attempt < job.oldest or (old and _age(take) <= _age(old.take)):
            return
        if old:
            self._close(old)
        job.oldest = take.attempt
        job.lanes[take.index] = _Lane(take, job.opened, TakeWriter(self._store, job.opened, take))
        early, job.early = job.early, []
        for chunk in early:
            self.chunk(chunk.message, chunk.frames)

    def drop(self, job_id: str, attempt: int) -> None:
        """Aborts an attempt; OutputDropped follows when no slot of it is read any more."""
        job = self._jobs.get(job_id)
        if job:
            job.oldest = max(job.oldest, attempt + 1)
            self._abort(job, attempt)
        self._drops.append(OutputDropped(job_id, attempt))
        self._answer()

    def publish(self, job_id: str, keep: Iterable[Artifact]) -> None:
        """Ends a job: aborts what is open and deletes its files but those in `keep`. Raises OSError."""
        job = self._jobs.pop(job_id, None)
        if job:
            self._abort(job)
        self._store.prune(job_id, [path for a in keep for path in (a.path, a.frames_path) if path])

    def reset(self, answer: OutputReady) -> None:
        """Aborts every open take; `answer` is sent when no slot is read any more, after all releases of before."""
        self._reset = answer
        for job in self._jobs.values():
            self._abort(job)
            job.lanes.clear()
            job.oldest = 0  # a new scheduler may not know of attempts that nobody journalled
        self._answer()

    def _abort(self, job: _Job, attempt: int | None = None) -> None:
        """Closes the lanes and releases the early chunks of attempts up to `attempt`, or of all."""
        for lane in job.lanes.values():
            if attempt is None or lane.take.attempt <= attempt:
                self._close(lane)
        early, job.early = job.early, []
        for chunk in early:
            if attempt is None or chunk.message.attempt <= attempt:
                self._release(chunk)
            else:
                job.early.append(chunk)

    def _answer(self) -> None:
        """Sends the answers to drops and to a reset that nothing busy holds up."""
        busy = {(lane.take.job, lane.take.attempt) for lane in self._busy}
        waiting, self._drops = self._drops, []
        for drop in waiting:
            if (drop.job, drop.attempt) in busy:
                self._drops.append(drop)
            else:
                self._send(drop)
        if self._reset and not busy:
            self._send(self._reset)
            self._reset = None

    def takes_preview(self, job_id: str, attempt: int) -> OpenJob | None:
        """The job, if a preview of that attempt is news."""
        job = self._jobs.get(job_id)
        return job.opened if job is not None and attempt >= job.oldest else None

    # ---- chunks

    def chunk(self, message: ChunkReady, frames: tuple[memoryview, ...] = ()) -> None:
        """Takes one chunk. A stale one is released at once, a wrong one fails its take."""
        chunk = _Chunk(message, frames)
        job = self._jobs.get(message.job)
        if job is None:
            self._release(chunk)
            return
        lane = job.lanes.get(message.index)
        if message.attempt >= job.oldest and (lane is None or _age(message) > _age(lane.take)):
            job.early.append(chunk)
        elif lane is None or _age(message) < _age(lane.take):
            self._release(chunk)
        elif message.chunk >= lane.next_chunk:  # else a repetition: the slot is released for the first one
            self._accept(lane, chunk)

    def _accept(self, lane: _Lane, chunk: _Chunk) -> None:
        fault = None if lane.closed else _fault(lane, chunk)
        if fault:
            self._fail(lane, ProtocolError(f"chunk {chunk.message.chunk}: {fault}"))
        if lane.closed:
            self._release(chunk)
            return
        lane.next_chunk += 1
        lane.frames += chunk.message.frames
        lane.pending.append(chunk)
        self._advance(lane)

    def _release(self, chunk: _Chunk) -> None:
        m = chunk.message
        self._send(SlotReleased(m.slot, m.job, m.attempt, m.index, m.take, m.chunk))

    # ---- lanes

    def collect(self) -> None:
        """Takes over what the pool has finished."""
        while self._done:
            lane, error, then = self._done.popleft()
            lane.busy = False
            self._busy.discard(lane)
            then(lane, error)
            self._advance(lane)
        self._answer()

    def close(self) -> None:
        """Waits for running work, starts none, and deletes what is unfinished."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for lane in self._busy.union(*(job.lanes.values() for job in self._jobs.values())):
            lane.writer.discard()

    def _advance(self, lane: _Lane) -> None:
        """Gives the pool the lane's next work, if there is any and none is running."""
        while lane.closed and lane.pending:
            self._release(lane.pending.popleft())
        if lane.busy:
            return
        if lane.closed and lane.writer.unfinished:
            self._submit(lane, lane.writer.discard, _discarded)
        elif lane.pending:
            chunk = lane.pending.popleft()
            self._submit(lane, partial(self._encode, lane, chunk), partial(self._encoded, chunk))

    def _submit(self, lane: _Lane, work: Callable[[], None], then: Then) -> None:
        def finished(future: Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            self._done.append((lane, error, then))
            self._wake()

        lane.busy = True
        self._busy.add(lane)
        self._pool.submit(work).add_done_callback(finished)

    def _encode(self, lane: _Lane, chunk: _Chunk) -> None:
        message = chunk.message
        if message.remote:
            flat = _remote_frames(chunk)
        else:
            flat = self._slots.read_chunk(message.slot, ChunkId.of(message), message.nbytes, message.crc32)
        lane.writer.add(flat.reshape(message.frames, message.height, message.width, 3))

    def _encoded(self, chunk: _Chunk, lane: _Lane, error: BaseException | None) -> None:
        self._release(chunk)
        if error:
            self._fail(lane, error)
        elif chunk.message.last and not lane.closed:
            self._submit(lane, lane.writer.seal, self._sealed)

    def _sealed(self, lane: _Lane, error: BaseException | None) -> None:
        if error or lane.closed:
            self._fail(lane, error)
            return
        try:
            artifact = lane.writer.publish()
        except OSError as rename_error:
            self._fail(lane, rename_error)
            return
        self._submit(lane, self._store.sync, partial(self._committed, artifact))

    def _committed(self, artifact: Artifact, lane: _Lane, error: BaseException | None) -> None:
        if error or lane.closed:
            self._fail(lane, error)
            return
        lane.closed = True
        take = lane.take
        log.info("job %s attempt %d output %d: wrote %s", take.job, take.attempt, take.index, artifact.path)
        self._send(ArtifactCommitted(take.job, take.attempt, take.take, artifact))

    def _close(self, lane: _Lane) -> None:
        lane.closed = True
        self._advance(lane)

    def _fail(self, lane: _Lane, error: BaseException | None) -> None:
        """Reports the error and closes the lane; nobody waits for a lane that is closed already."""
        take, media = lane.take, lane.job.media
        if error and not lane.closed:
            message = f"output {take.index} could not be written as {media.format.value}: {error}"
            log.error("job %s attempt %d: %s", take.job, take.attempt, message)
            code = error.code if isinstance(error, SafelightError) else JobFailed.code
            info = ErrorInfo(code, message)
            self._send(ArtifactFailed(take.job, take.attempt, take.index, take.take, info))
        self._close(lane)


def _age(of: OpenTake | ChunkReady) -> tuple[int, int]:
    return of.attempt, of.take


def _fault(lane: _Lane, chunk: _Chunk) -> str | None:
    """What is wrong with a chunk, or with its place in the take."""
    m, job = chunk.message, lane.job
    total = lane.frames + m.frames
    parts = 1 if m.remote else 0
    if m.chunk != lane.next_chunk:
        return f"chunk {lane.next_chunk} is missing"
    if (m.height, m.width) != (job.height, job.width):
        return f"expected frames of {job.width}x{job.height}, got {m.width}x{m.height}"
    if m.frames < 1 or total > job.num_frames or (m.last and total != job.num_frames):
        return f"expected {job.num_frames} frames in all, got {total}{' and no more' if m.last else ''}"
    if m.nbytes != m.frames * m.height * m.width * 3:
        return f"expected {m.frames * m.height * m.width * 3} bytes, got {m.nbytes}"
    if len(chunk.frames) != parts:
        return f"expected {parts} extra message frames with remote={m.remote}, got {len(chunk.frames)}"
    return None


def _remote_frames(chunk: _Chunk) -> Bytes:
    flat = np.frombuffer(chunk.frames[0], np.uint8)
    if flat.nbytes != chunk.message.nbytes or zlib.crc32(flat.data) != chunk.message.crc32:
        raise ProtocolError(f"frames that do not match their length or checksum: {flat.nbytes} bytes")
    return flat


def _discarded(lane: _Lane, error: BaseException | None) -> None:
    if error:
        log.warning("job %s: an unfinished file could not be deleted: %s", lane.take.job, error)
