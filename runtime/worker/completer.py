"""The second thread of a rank: waits for a plan's device work, hands its frames over, acknowledges it."""

from __future__ import annotations

import queue
import threading
import zlib
from collections import deque
from collections.abc import Callable

import torch

from safelight.runtime.errors import SafelightError
from safelight.runtime.messages import ChunkReady, PlanDone, PreviewReady, TensorRef, WorkerSpec
from safelight.runtime.slots import ChunkId, MappedPool
from safelight.runtime.worker.executor import Launched, PendingChunk, PendingPreview, result_of
from safelight.runtime.worker.link import Link
from safelight.runtime.worker.memory import peak_bytes


class Completer:
    """Plans are completed in the order in which they were launched. `fatal` is called when a device wait fails."""

    def __init__(
        self, spec: WorkerSpec, link: Link, device: torch.device, weights: int, fatal: Callable[[Exception], None]
    ) -> None:
        self._spec = spec
        self._link = link
        self._device = device
        self._weights_bytes = weights
        self._fatal = fatal
        self._slots = MappedPool(spec.slots) if spec.slots else None
        self._launched: queue.SimpleQueue[Launched | None] = queue.SimpleQueue()
        self._previews: deque[PendingPreview] = deque()  # a copy that is late waits for the next plan, not that for it
        self._thread = threading.Thread(target=self._run, name="completer", daemon=True)
        self._thread.start()

    def submit(self, launched: Launched) -> None:
        self._launched.put(launched)

    def close(self, timeout_s: float = 5.0) -> None:
        """Completes what was launched."""
        self._launched.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (launched := self._launched.get()) is not None:
            try:
                self._complete(launched)
            except (SafelightError, RuntimeError, OSError, ValueError) as error:
                self._fatal(error)
                return

    def _complete(self, launched: Launched) -> None:
        for op in launched.ops:
            if op.span:
                op.span[1].synchronize()
            if op.chunk:
                self._hand_over(op.chunk)
        plan = launched.plan
        self._link.note_done(plan)
        self._link.send(
            PlanDone(
                scheduler_epoch=plan.scheduler_epoch,
                group=plan.group,
                rank=self._spec.rank,
                group_epoch=plan.group_epoch,
                number=plan.number,
                results=tuple(result_of(op) for op in launched.ops),
                peak_bytes=peak_bytes(self._device, self._weights_bytes),
            )
        )
        self._previews += [op.preview for op in launched.ops if op.preview]
        self._send_previews()

    def _send_previews(self) -> None:
        """Those that are on the host, in order."""
        while self._previews and ((copied := self._previews[0].copied) is None or _passed(copied)):
            preview = self._previews.popleft()
            op, pixels = preview.op, preview.pixels.numpy()
            part = pixels.data.cast("B")
            ref = TensorRef(pixels.shape, str(pixels.dtype), pixels.nbytes, zlib.crc32(part))
            self._link.send_preview(PreviewReady(op.job, op.attempt, op.index, op.number, op.step, ref), part)

    def _hand_over(self, chunk: PendingChunk) -> None:
        if chunk.copied:
            chunk.copied.synchronize()
        op, frames = chunk.op, chunk.frames.numpy()
        if self._slots:
            parts: tuple[memoryview, ...] = ()
            crc = self._slots.write_chunk(op.slot, ChunkId.of(op), frames)
        else:
            parts = (frames.data.cast("B"),)
            crc = zlib.crc32(parts[0])
        count, height, width, _channels = frames.shape
        self._link.send_chunk(
            ChunkReady(
                job=op.job,
                attempt=op.attempt,
                index=op.index,
                take=op.take,
                chunk=op.chunk,
                last=chunk.last,
                slot=op.slot,
                frames=count,
                height=height,
                width=width,
                nbytes=frames.nbytes,
                crc32=crc,
                remote=self._slots is None,
            ),
            parts,
        )


def _passed(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]
