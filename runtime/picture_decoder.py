"""Turns the bytes of one picture file into RGB pixels. As a program, in a process that can do nothing else.

The program is started by `runtime.picture_guard`, by this file's path and with nothing of Safelight imported: the file
is its standard input, the pixels its standard output, what it found a line of JSON on the descriptor that it is told.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # when this is a program, what it may need is not there yet
    from PIL import Image as Pillow

MEMORY, CPU_S = 2 << 30, 10  # of address space; of processor time
STATUS_BYTES = 1000
MAGIC = ((b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"RIFF", "WEBP"))
_ORIENTATION = 0x0112  # of EXIF
_NOBODY = 65534
_WHITE = (255, 255, 255)


def main(pillow: str, status: int, most_pixels: int) -> None:
    """`pillow`: the folder that has PIL, as nothing but the standard library is on this program's path."""
    sys.path.append(pillow)
    from PIL import ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    assert TiffImagePlugin is not None  # reads EXIF, and would be imported when it is too late for that
    plugins = {
        "PNG": PngImagePlugin.PngImageFile,
        "JPEG": JpegImagePlugin.JpegImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
    }
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    data = sys.stdin.buffer.read()
    _confine(3 * most_pixels)
    try:
        found = _decode(data, plugins, most_pixels)
    except MemoryError:
        found = {"error": "it takes too much memory to decode"}
    except Exception as error:  # whatever a decoder raises is about the file
        found = {"error": f"it cannot be decoded: {error}"[:300]}
    line = json.dumps(found).encode()
    os.write(status, line if len(line) <= STATUS_BYTES else b'{"error": "it cannot be decoded"}')
    os._exit(0)  # nothing of what was decoded is cleaned up by code that could trip over it


def _confine(output_bytes: int) -> None:
    """No way back from here: no file, socket or process can be opened, memory and time are bounded, no core is left.

    Root, who may lift limits again, becomes nobody where the system allows it.
    """
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_FSIZE, output_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    if os.getuid() == 0:
        with contextlib.suppress(OSError):  # a container may have no nobody
            os.setgroups([])
        with contextlib.suppress(OSError):
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _decode(
    data: bytes, plugins: Mapping[str, Callable[[io.BytesIO], Pillow.Image]], most_pixels: int
) -> dict[str, object]:
    kind = next((name for magic, name in MAGIC if data.startswith(magic)), None)
    if kind is None or (kind == "WEBP" and data[8:12] != b"WEBP"):
        return {"error": "it is neither PNG nor JPEG nor WebP"}
    image = plugins[kind](io.BytesIO(data))  # the header only
    width, height = image.size
    if not 0 < width * height <= most_pixels:
        return {"error": f"at most {most_pixels / 1e6:g} megapixels expected, got {width}x{height}"}
    image.load()
    upright = flattened(turned(image))
    view, sent = memoryview(upright.tobytes()), 0
    while sent < len(view):
        sent += os.write(1, view[sent:])
    return {"width": upright.width, "height": upright.height}


def turned(image: Pillow.Image) -> Pillow.Image:
    """Upright, as EXIF says. EXIF that cannot be read says nothing."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # of a part of the file that is not the picture
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    return image.transpose(turns[orientation]) if orientation in turns else image


def flattened(image: Pillow.Image) -> Pillow.Image:
    """As RGB: what is transparent lies on white, as a page would show it; of 16 bits the upper 8 count."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        little = image.convert("I;16").tobytes()
        return Image.frombytes("L", image.size, little[1::2]).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    white = Image.new("RGB", image.size, _WHITE)
    white.paste(layers, mask=layers.getchannel("A"))
    return white


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
