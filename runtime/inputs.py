"""Pictures that requests bring: checked where they come in, kept as PNG files named by what is in them.

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
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from safelight.runtime.errors import InvalidRequest, JobFailed
from safelight.runtime.messages import InputImage

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 64 << 20
MAX_PIXELS = 8192 * 8192
UNUSED_S = 3600.0  # a picture may be stored well before the job that names it is accepted
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What Pillow raises for files that lie about themselves.
_BROKEN = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class Picture:
    """A checked picture: RGB, upright, as PNG."""

    ref: InputImage
    png: bytes


def check_picture(data: bytes, param: str = "image_path") -> Picture:
    """Decodes bytes of a PNG, JPEG or WebP file; only its first frame and its pixels are kept.

    Raises InvalidRequest naming `param`: too many bytes or pixels (known before they are decoded), another format, a
    broken file.
    """
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"{param}: at most {MAX_BYTES >> 20} MiB expected, got {len(data) >> 20} MiB", param=param)
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            found = Image.open(io.BytesIO(data), formats=FORMATS)
        if found.width * found.height > MAX_PIXELS:
            raise InvalidRequest(
                f"{param}: at most {MAX_PIXELS / 1e6:.0f} megapixels expected, got {found.width}x{found.height}",
                param=param,
            )
        upright = ImageOps.exif_transpose(found)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")  # palettes can have an alpha of each colour
        upright = upright.convert("RGB")
    except _BROKEN as error:
        names = ", ".join(FORMATS)
        raise InvalidRequest(
            f"{param}: a picture ({names}) expected that can be decoded: {error}", param=param
        ) from error
    return _picture(upright)


def picture_of(image: Image.Image, param: str = "images") -> Picture:
    """A picture that is decoded already. Raises InvalidRequest naming `param`."""
    if image.width * image.height > MAX_PIXELS or not image.width * image.height:
        raise InvalidRequest(
            f"{param}: 1 to {MAX_PIXELS} pixels expected, got {image.width}x{image.height}", param=param
        )
    return _picture(image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB"))


def _picture(image: Image.Image) -> Picture:
    plain = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(plain, "PNG", compress_level=1)  # pixels, no metadata
    png = plain.getvalue()
    return Picture(InputImage(hashlib.sha256(png).hexdigest(), image.width, image.height), png)


def check_ref(ref: InputImage) -> None:
    """Raises InvalidRequest for a picture that is not named as `InputStore` names it."""
    if not _SHA256.fullmatch(ref.sha256):
        raise InvalidRequest(f"image: a sha256 in hexadecimal expected, got {ref.sha256[:80]!r}", param="image_path")


class InputStore:
    """The folder of a run's pictures; frontends add, workers read, the scheduler sweeps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, picture: Picture) -> InputImage:
        """Keeps a picture durably; one that is there already stays."""
        path = self._path(picture.ref)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=self._folder)
        with open(handle, "wb") as file:
            file.write(picture.png)
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
        return Image.open(io.BytesIO(data), formats=("PNG",)).convert("RGB")

    def sweep(self, used: Iterable[InputImage]) -> None:
        """Deletes what no open job names and what is not fresh."""
        names = {f"{ref.sha256}.png" for ref in used}
        for path in self._folder.iterdir():
            if path.name in names:
                continue
            with contextlib.suppress(FileNotFoundError):  # a picture that was being written has its name now
                if time.time() - path.stat().st_mtime > UNUSED_S:
                    path.unlink()

    def _path(self, ref: InputImage) -> Path:
        if not _SHA256.fullmatch(ref.sha256):
            raise JobFailed(f"an input picture is named by its sha256, got {ref.sha256[:80]!r}")
        return self._folder / f"{ref.sha256}.png"
