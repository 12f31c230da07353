"""Previews: a few latent pixels in, a small encoded picture out. Losing one is no fault, so nothing here ever waits."""

from __future__ import annotations

import io
import logging
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image

from safelight.runtime.errors import ProtocolError
from safelight.runtime.messages import MediaFormat, OpenJob, PreviewMade, PreviewReady
from safelight.runtime.output.media import MEDIA_TYPES, STILLS, Frames, save_still

MAX_SIDE = 256  # pixels of a preview, unless its latents are larger
MAX_LATENT_SIDE = 2048
MAX_WAITING = 8  # in the pool; more are left out, so that finished pictures do not wait for them
log = logging.getLogger(__name__)


class Previews:
    """`wake` is called, on any thread, to have `collect` called on the loop's thread."""

    def __init__(self, pool: ThreadPoolExecutor, wake: Callable[[], None]) -> None:
        self._pool = pool
        self._wake = wake
        self._waiting: deque[tuple[PreviewReady, Future[tuple[PreviewMade, bytes]]]] = deque()

    def add(self, message: PreviewReady, frames: tuple[memoryview, ...], job: OpenJob) -> None:
        """Has a preview encoded. Raises ProtocolError for one that does not match its description."""
        pixels = _pixels(message, frames)
        if len(self._waiting) >= MAX_WAITING:
            return
        future = self._pool.submit(encode, message, pixels, job)
        self._waiting.append((message, future))
        future.add_done_callback(lambda _: self._wake())

    def collect(self) -> list[tuple[int, PreviewMade, bytes]]:
        """(attempt, message without its number in the job's events, the picture) of each that is done, in the order in
        which they were added: a stream takes no preview after a later one."""
        made = []
        while self._waiting and self._waiting[0][1].done():
            message, future = self._waiting.popleft()
            if future.cancelled():
                continue
            if (error := future.exception()) is not None:
                log.warning("job %s: no preview of step %d: %s", message.job, message.step, error)
                continue
            made.append((message.attempt, *future.result()))
        return made


def encode(message: PreviewReady, pixels: Frames, job: OpenJob) -> tuple[PreviewMade, bytes]:
    """Enlarged to at most MAX_SIDE, and never beyond the picture's own size; JPEG where that is no still picture."""
    height, width = pixels.shape[:2]
    scale = max(1.0, min(job.width / width, job.height / height, MAX_SIDE / max(width, height)))
    image = Image.fromarray(pixels).resize((round(scale * width), round(scale * height)), Image.Resampling.BICUBIC)
    format = job.media.format if job.media.format in STILLS else MediaFormat.JPEG
    target = io.BytesIO()
    save_still(image, target, format, job.media.quality)
    data = target.getvalue()
    made = PreviewMade(
        message.job, -1, message.index, message.number, message.step, image.width, image.height,
        MEDIA_TYPES[format], len(data),
    )  # fmt: skip
    return made, data


def _pixels(message: PreviewReady, frames: tuple[memoryview, ...]) -> Frames:
    ref = message.pixels
    height, width, *rest = (*ref.shape, 0, 0)
    fits = rest[:-2] == [3] and 0 < height <= MAX_LATENT_SIDE and 0 < width <= MAX_LATENT_SIDE and ref.dtype == "uint8"
    if len(frames) != 1 or not fits or not ref.nbytes == frames[0].nbytes == height * width * 3:
        raise ProtocolError(f"a preview of uint8 (h, w, 3) in one extra frame expected, got {ref} in {len(frames)}")
    if zlib.crc32(frames[0]) != ref.crc32:
        raise ProtocolError("a preview does not match its checksum")
    return np.frombuffer(frames[0], np.uint8).reshape(height, width, 3)
