"""Frames to files: PNG, JPEG, WebP (still and animated), MP4 and NPY, each written as its frames arrive.

Frames are uint8 RGB (F, H, W, 3). An encoder belongs to one take and is used by one thread at a time; Pillow and PyAV
release the GIL while they work. Nothing is ever resized and no frame is ever left out.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from safelight.runtime.errors import InvalidRequest
from safelight.runtime.messages import MediaFormat, OpenJob

Frames = npt.NDArray[np.uint8]

MEDIA_TYPES = {
    MediaFormat.PNG: "image/png",
    MediaFormat.JPEG: "image/jpeg",
    MediaFormat.WEBP: "image/webp",
    MediaFormat.MP4: "video/mp4",
    MediaFormat.NPY: "application/x-npy",
}
STILLS = (MediaFormat.PNG, MediaFormat.JPEG, MediaFormat.WEBP)
EXTENSIONS = {MediaFormat.JPEG: "jpg"}  # the others are named like their format
PNG_LEVEL = 2  # 1024x1024: 92 ms and 1 % larger than level 3's 134 ms; level 6 takes 458 ms for 14 % less
DEFAULT_QUALITY = {MediaFormat.JPEG: 92, MediaFormat.WEBP: 90}


class Encoder(Protocol):
    """`add` all frames in order, then `finish`; or `abort` at any point, which leaves a file to be deleted."""

    def add(self, frames: Frames) -> None: ...
    def finish(self) -> None: ...
    def abort(self) -> None: ...


def extension(format: MediaFormat) -> str:
    return EXTENSIONS.get(format, format.value)


def open_encoder(path: Path, format: MediaFormat, job: OpenJob) -> Encoder:
    """The encoder that writes one output of `job` to `path`, which exists and is empty.

    Raises InvalidRequest for several frames in a format of one, and OSError.
    """
    match format:
        case MediaFormat.NPY:
            return NpyEncoder(path, job)
        case MediaFormat.MP4:
            from safelight.runtime.output.mp4 import Mp4Encoder  # here: pictures need no FFmpeg

            return Mp4Encoder(path, job)
        case MediaFormat.WEBP if job.num_frames > 1:
            return AnimatedWebpEncoder(path, job)
    if job.num_frames > 1:
        raise InvalidRequest(
            f"a {format.value} file holds one frame, this output has {job.num_frames}: ask for mp4, webp or npy",
            param="format",
        )
    return StillEncoder(path, format, job.media.quality)


def save_still(image: Image.Image, target: Path | BinaryIO, format: MediaFormat, quality: int | None) -> None:
    """One picture as PNG (lossless), JPEG (no chroma subsampling) or WebP."""
    options: dict[str, Any] = {"compress_level": PNG_LEVEL}
    if format is not MediaFormat.PNG:
        options = {"quality": DEFAULT_QUALITY[format] if quality is None else quality}
    if format is MediaFormat.JPEG:
        options["subsampling"] = 0
    image.save(target, format=format.value, **options)


class StillEncoder:
    """One frame as `save_still` writes it."""

    def __init__(self, path: Path, format: MediaFormat, quality: int | None) -> None:
        self._path, self._format, self._quality = path, format, quality

    def add(self, frames: Frames) -> None:
        save_still(Image.fromarray(frames[0]), self._path, self._format, self._quality)

    def finish(self) -> None:
        pass

    def abort(self) -> None:
        pass


class NpyEncoder:
    """Raw frames, (F, H, W, 3) uint8, readable by numpy.load(allow_pickle=False)."""

    def __init__(self, path: Path, job: OpenJob) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by finish or abort)
        shape = (job.num_frames, job.height, job.width, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def add(self, frames: Frames) -> None:
        self._file.write(np.ascontiguousarray(frames).data)

    def finish(self) -> None:
        self._file.close()

    def abort(self) -> None:
        with contextlib.suppress(OSError):  # what was buffered may not fit the disk
            self._file.close()


class AnimatedWebpEncoder:
    """Several frames, looping. They wait in an unnamed file beside the result: Pillow takes them all at the end."""

    def __init__(self, path: Path, job: OpenJob) -> None:
        self._path = path
        self._shape = (job.num_frames, job.height, job.width, 3)
        ends = [round((frame + 1) * 1000 / job.fps) for frame in range(job.num_frames)]
        self._milliseconds = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self._quality = DEFAULT_QUALITY[MediaFormat.WEBP] if job.media.quality is None else job.media.quality
        self._spool = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed by finish or abort)

    def add(self, frames: Frames) -> None:
        self._spool.write(np.ascontiguousarray(frames).data)

    def finish(self) -> None:
        self._spool.flush()
        frames = np.memmap(self._spool, np.uint8, "r", shape=self._shape)
        images: Iterator[Image.Image] = (Image.fromarray(np.asarray(frame)) for frame in frames)
        next(images).save(
            self._path,
            format="webp",
            save_all=True,
            append_images=images,
            duration=self._milliseconds,
            loop=0,
            quality=self._quality,
        )
        self._spool.close()

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._spool.close()
