"""Decodes pictures of strangers, in a process of its own for each: the files may be made to break the decoder.

That process has no secrets, no open file, and limits of memory and time; whatever becomes of it is told of the file.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import PIL

from safelight.runtime import picture_decoder
from safelight.runtime.errors import InvalidRequest

WAIT_S = 20.0  # longer than the process has of processor time, for machines that are busy
_BROKEN = "it cannot be decoded: it broke the decoder, or takes too much time"


class _Found(msgspec.Struct, frozen=True):
    error: str = ""
    width: int = 0
    height: int = 0


def decode(data: bytes, most_pixels: int, param: str) -> tuple[int, int, bytes]:
    """Width, height and RGB bytes of a PNG, JPEG or WebP file. Takes about 0.1 s more than the decoding.

    Raises InvalidRequest naming `param` when the file cannot be decoded within the limits, whatever the reason.
    """
    source, pixels = _unnamed(), _unnamed()
    receiving, sending = os.pipe()
    try:
        with os.fdopen(os.dup(source), "wb") as file:
            file.write(data)
        os.lseek(source, 0, os.SEEK_SET)
        process = _start(source, pixels, sending, most_pixels)
        os.close(sending)
        sending = -1
        try:
            line = _told(receiving)
        finally:
            process.kill()
            process.wait()
        found = _checked(line, most_pixels)
        rgb = os.pread(pixels, 3 * found.width * found.height, 0) if not found.error else b""
        if found.error or len(rgb) != 3 * found.width * found.height:
            why = found.error or _BROKEN
            raise InvalidRequest(f"{param}: a picture (PNG, JPEG, WEBP) expected; {why}", param=param)
        return found.width, found.height, rgb
    finally:
        for descriptor in (source, pixels, receiving, sending):
            if descriptor >= 0:
                os.close(descriptor)


def _unnamed() -> int:
    """A file in memory, without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("picture")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _start(source: int, pixels: int, status: int, most_pixels: int) -> subprocess.Popen[bytes]:
    """Nothing of this environment but what the interpreter itself may need."""
    folder = str(Path(PIL.__file__).parents[1])
    environ = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", picture_decoder.__file__, folder, str(status), str(most_pixels)],
        stdin=source, stdout=pixels, stderr=subprocess.DEVNULL, env=environ, pass_fds=(status,), cwd="/",
    )  # fmt: skip


def _told(receiving: int) -> bytes:
    """What the process said until its end, or until its time is over."""
    deadline, line = time.monotonic() + WAIT_S, b""
    while len(line) <= picture_decoder.STATUS_BYTES and (left := deadline - time.monotonic()) > 0:
        poll = select.poll()
        poll.register(receiving, select.POLLIN)
        if not poll.poll(1000 * left):
            break
        part = os.read(receiving, picture_decoder.STATUS_BYTES + 1)
        if not part:
            return line
        line += part
    return b""


def _checked(line: bytes, most_pixels: int) -> _Found:
    """The process may have been taken over by the file: what it says is not trusted either."""
    try:
        found = msgspec.json.decode(line, type=_Found)
    except msgspec.MsgspecError:
        return _Found(_BROKEN)
    if found.error:
        return _Found("".join(letter if letter.isprintable() else "?" for letter in found.error))
    sized = found.width > 0 and found.height > 0 and found.width * found.height <= most_pixels
    return found if sized else _Found(_BROKEN)
