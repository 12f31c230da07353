"""Pictures of requests are checked before they are decoded, kept by hash, and never read from anywhere else."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safelight.runtime import inputs, picture_decoder, picture_guard
from safelight.runtime.errors import InvalidRequest, JobFailed
from safelight.runtime.inputs import InputStore, check_picture
from safelight.runtime.messages import InputImage


def encoded(kind: str, size: tuple[int, int] = (6, 4), mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(file, kind, **options)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_of_each_format_is_kept_as_its_pixels(tmp_path: Path, kind: str) -> None:
    data = encoded(kind)
    store = InputStore(tmp_path)
    ref = store.add(check_picture(data))
    assert (ref.width, ref.height) == (6, 4)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(store.read(ref)), expected)
    assert [path.name for path in tmp_path.iterdir()] == [f"{ref.sha256}.ppm"]


def test_other_modes_become_rgb_on_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 255, 0))
    grey = Image.frombytes("I;16", (2, 1), bytes([7, 255, 9, 128]))
    palette = half.convert("P")
    palette.info["transparency"] = palette.getpixel((1, 0))
    ink = io.BytesIO()
    Image.new("CMYK", (2, 1), (0, 255, 255, 0)).save(ink, "JPEG", quality=100)
    red, white = (255, 0, 0), (255, 255, 255)
    for data, expected in (
        (png(half), [red, white]),
        (png(palette), [red, white]),
        (png(half.convert("LA")), [(76, 76, 76), white]),
        (png(half.convert("L")), [(76, 76, 76), (29, 29, 29)]),
        (png(Image.new("1", (2, 1), 1)), [white, white]),
        (png(grey), [(255, 255, 255), (128, 128, 128)]),
        (ink.getvalue(), [red, red]),
    ):
        picture = check_picture(data)
        colours = np.frombuffer(picture.ppm[-6:], np.uint8).reshape(2, 3)
        assert np.abs(colours.astype(int) - expected).max() <= 2, expected


def test_of_an_animation_the_first_frame_is_taken() -> None:
    first, second = Image.new("RGB", (2, 1), (255, 0, 0)), Image.new("RGB", (2, 1), (0, 255, 0))
    for kind in ("PNG", "WEBP"):
        file = io.BytesIO()
        first.save(file, kind, save_all=True, append_images=[second], lossless=True)
        assert check_picture(file.getvalue()).ppm[-6:] == bytes([255, 0, 0] * 2)


def test_a_turned_photograph_is_upright_and_loses_its_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010E] = "taken at home"
    picture = check_picture(encoded("JPEG", exif=exif.tobytes()))
    assert (picture.ref.width, picture.ref.height) == (4, 6)
    assert b"taken at home" not in picture.ppm


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, content: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def hostile() -> dict[str, bytes]:
    """Files that are broken, lie about themselves, or are made to cost much."""
    jpeg, webp = encoded("JPEG", (40, 30)), encoded("WEBP", (40, 30))
    flipped = bytearray(encoded("PNG", (40, 30)))
    flipped[60] ^= 0xFF
    return {
        "nothing": b"", "gif": encoded("GIF"), "bmp": encoded("BMP"), "tiff": encoded("TIFF"),
        "pickle": b"\x80\x04cos\nsystem\n", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "cut png": encoded("PNG")[:60], "cut jpeg": jpeg[: len(jpeg) // 2], "cut webp": webp[: len(webp) // 2],
        "flipped": bytes(flipped), "magic only": b"\x89PNG\r\n\x1a\n", "riff only": b"RIFF\0\0\0\0WAVE",
        "no pixels": png_of(0, 5, zlib.compress(b"")), "few pixels": png_of(100, 100, zlib.compress(b"\0")),
        "bomb": png_of(60_000, 60_000, zlib.compress(bytes(1 << 20))),
        "text bomb": png_of(1, 1, zlib.compress(bytes(4)), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(90 << 20)))),
    }  # fmt: skip


def test_files_that_are_no_pictures_or_lie_are_refused() -> None:
    refused = {}
    for name, data in hostile().items():
        with pytest.raises(InvalidRequest, match="PNG, JPEG, WEBP") as caught:
            check_picture(data, "image")
        assert caught.value.param == "image"
        assert "object at" not in caught.value.message
        refused[name] = caught.value.message
    assert "60000x60000" in refused["bomb"]
    assert "neither PNG nor JPEG nor WebP" in refused["gif"]


def test_a_file_that_breaks_the_decoder_breaks_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The decoder of these is one that a file has taken over, or killed."""
    monkeypatch.setattr(picture_guard, "WAIT_S", 1.5)
    data = encoded("PNG")
    for number, program in enumerate(
        (
            "import os; os.kill(os.getpid(), 11)",
            "import time; time.sleep(60)",
            "import os, sys\nwhile True: os.write(int(sys.argv[2]), b'x' * 4096)",
            "import os, sys; os.write(int(sys.argv[2]), b'[]')",
            """import os, sys; os.write(int(sys.argv[2]), b'{"width": 9, "height": 9}')""",
            """import os, sys; os.write(int(sys.argv[2]), b'{"width": 1000000, "height": 1000000}')""",
            """import os, sys; os.write(int(sys.argv[2]), b'{"width": true, "height": -4}')""",
            "raise SystemExit(3)",
        )
    ):
        path = tmp_path / f"{number}.py"
        path.write_text(program)
        with monkeypatch.context() as patched:
            patched.setattr(picture_decoder, "__file__", str(path))
            with pytest.raises(InvalidRequest, match="broke the decoder"):
                check_picture(data)
    assert check_picture(data).ref.width == 6


CONFINED = """
import importlib.util, json, os, resource, signal, socket, sys
spec = importlib.util.spec_from_file_location("decoder", {program!r})
decoder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(decoder)
decoder.MEMORY, decoder.CPU_S = 300 << 20, 1
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
decoder._confine(5)
went = []
def attempt(name, call):
    try:
        call()
        went.append(name)
    except (OSError, MemoryError, ValueError):
        pass
"""
ATTEMPTS = """
attempt("read", lambda: open("/etc/passwd"))
attempt("write", lambda: open({made!r}, "w"))
attempt("connect", lambda: socket.socket())
attempt("fork", lambda: os.fork() or os._exit(0))
attempt("limits", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99)))
attempt("memory", lambda: bytearray(400 << 20))
went += [str(os.write(1, b"123456789")), *(name for name in os.environ if name != "LC_CTYPE")]
os.write(int(sys.argv[2]), json.dumps({{"error": " ".join(went)}}).encode())
"""


def test_the_decoder_is_confined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program in its place says what it could do: write 5 bytes of its answer."""
    monkeypatch.setenv("SAFELIGHT_API_KEY", "secret")
    path, confined = tmp_path / "tries.py", CONFINED.format(program=picture_decoder.__file__)
    path.write_text(confined + ATTEMPTS.format(made=str(tmp_path / "made")))
    monkeypatch.setattr(picture_decoder, "__file__", str(path))
    with pytest.raises(InvalidRequest, match=r"expected; 5$"):
        check_picture(encoded("PNG"))
    path.write_text(confined + "while True: pass")
    with pytest.raises(InvalidRequest, match="takes too much time"):
        check_picture(encoded("PNG"))


def test_limits_hold_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("PNG", (100, 100))
    monkeypatch.setattr(inputs, "MAX_PIXELS", 9_999)
    with pytest.raises(InvalidRequest, match="100x100"):
        check_picture(data)
    monkeypatch.setattr(inputs, "MAX_BYTES", 100)
    with pytest.raises(InvalidRequest, match="MiB"):
        check_picture(data)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 63, "A" * 64, ""])
def test_only_a_hash_names_a_picture(tmp_path: Path, name: str) -> None:
    with pytest.raises(JobFailed, match="sha256"):
        InputStore(tmp_path).read(InputImage(name, 1, 1))


def test_a_missing_or_changed_picture_is_a_failure_of_the_job(tmp_path: Path) -> None:
    store = InputStore(tmp_path)
    gone = hashlib.sha256(b"gone").hexdigest()
    with pytest.raises(JobFailed, match="cannot be read"):
        store.read(InputImage(gone, 1, 1))
    ref = store.add(check_picture(encoded("PNG")))
    (tmp_path / f"{ref.sha256}.ppm").write_bytes(encoded("PNG", (9, 9)))
    with pytest.raises(JobFailed, match="not the one"):
        store.read(ref)


def test_a_sweep_keeps_what_is_used_or_fresh(tmp_path: Path) -> None:
    store = InputStore(tmp_path)
    used, fresh, old = (store.add(check_picture(encoded("PNG", (n, n)))) for n in (3, 4, 5))
    for ref in (used, old):
        os.utime(tmp_path / f"{ref.sha256}.ppm", (0, 0))
    store.sweep([used])
    assert {path.stem for path in tmp_path.iterdir()} == {used.sha256, fresh.sha256}
