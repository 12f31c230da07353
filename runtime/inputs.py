"""Pictures that requests bring: checked where they come in, kept as plain pixels (PPM) in files named by their content.

Requests name them by hash, size and nothing else, so that no client can make a worker read another file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from safelight.runtime import picture_guard
from safelight.runtime.errors import InvalidRequest, JobFailed, Overloaded
from safelight.runtime.messages import InputImage
from safelight.runtime.picture_decoder import flattened

MAX_BYTES = 64 << 20
MAX_PIXELS = 8192 * 8192
MAX_STORED = 16 << 30
UNUSED_S = 3600.0  # a picture may be stored well before the job that names it is accepted
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Picture:
    """A checked picture: RGB, upright, as the bytes of a PPM file."""

    ref: InputImage
    ppm: bytes


def check_picture(data: bytes, param: str = "image_path", most_pixels: int | None = None) -> Picture:
    """Decodes bytes of a PNG, JPEG or WebP file, guarded; only its first frame and its pixels are kept.

    Raises InvalidRequest naming `param`: too many bytes or pixels (known before they are decoded), another format, a
    broken file.
    """
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"{param}: at most {MAX_BYTES >> 20} MiB expected, got {len(data) >> 20} MiB", param=param)
    return _picture(*picture_guard.decode(data, MAX_PIXELS if most_pixels is None else most_pixels, param))


def picture_of(image: Image.Image, param: str = "images") -> Picture:
    """A picture that is decoded already. Raises InvalidRequest naming `param`."""
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise InvalidRequest(
            f"{param}: 1 to {MAX_PIXELS} pixels expected, got {image.width}x{image.height}", param=param
        )
    rgb = flattened(image)
    return _picture(rgb.width, rgb.height, rgb.tobytes())


def _picture(width: int, height: int, rgb: bytes) -> Picture:
    data = b"P6\n%d %d\n255\n" % (width, height) + rgb  # 60 ms instead of a second for a photograph as PNG
    return Picture(InputImage(hashlib.sha256(data).hexdigest(), width, height), data)


def check_ref(ref: InputImage) -> None:
    """Raises InvalidRequest for a picture that is not named as `InputStore` names it."""
    if not _SHA256.fullmatch(ref.sha256):
        raise InvalidRequest(f"image: a sha256 in hexadecimal expected, got {ref.sha256[:80]!r}", param="image_path")


class InputStore:
    """The folder of a run's pictures; frontends add, workers read, the scheduler sweeps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, picture: Picture) -> InputImage:
        """Keeps a picture durably; one that is there already stays. Raises Overloaded: MAX_STORED bytes are kept."""
        path = self._path(picture.ref)
        if not path.exists() and self._stored() > MAX_STORED:
            raise Overloaded(f"{MAX_STORED >> 30} GiB of input pictures are kept; try again later", retry_after_s=60)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=self._folder)
        with open(handle, "wb") as file:
            file.write(picture.ppm)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return picture.ref

    def read(self, ref: InputImage) -> Image.Image:
        """The picture of a request. Raises JobFailed when it is gone or not the one that was stored."""
        try:
            data = self._path(ref).read_bytes()
        except OSError as error:
            raise JobFailed(
                f"the input picture {ref.sha256[:12]} cannot be read: {error.strerror}; workers on other hosts need a "
                "--state-dir that they share with the server"
            ) from error
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise JobFailed(f"the input picture {ref.sha256[:12]} is not the one that was stored")
        return Image.open(io.BytesIO(data), formats=("PPM",)).convert("RGB")

    def sweep(self, used: Iterable[InputImage]) -> None:
        """Deletes what no open job names and what is not fresh."""
        names = {f"{ref.sha256}.ppm" for ref in used}
        for path in self._folder.iterdir():
            if path.name in names:
                continue
            with contextlib.suppress(FileNotFoundError):  # a picture that was being written has its name now
                if time.time() - path.stat().st_mtime > UNUSED_S:
                    path.unlink()

    def _stored(self) -> int:
        """Bytes."""
        total = 0
        with os.scandir(self._folder) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):  # swept meanwhile
                    total += entry.stat().st_size
        return total

    def _path(self, ref: InputImage) -> Path:
        if not _SHA256.fullmatch(ref.sha256):
            raise JobFailed(f"an input picture is named by its sha256, got {ref.sha256[:80]!r}")
        return self._folder / f"{ref.sha256}.ppm"
