"""Pictures of requests are checked before they are decoded, kept by hash, and never read from anywhere else."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safelight.runtime import inputs
from safelight.runtime.errors import InvalidRequest, JobFailed
from safelight.runtime.inputs import InputStore, check_picture
from safelight.runtime.messages import InputImage


def encoded(kind: str, size: tuple[int, int] = (6, 4), mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_of_each_format_is_kept_as_its_pixels(tmp_path: Path, kind: str) -> None:
    data = encoded(kind)
    store = InputStore(tmp_path)
    ref = store.add(check_picture(data))
    assert (ref.width, ref.height) == (6, 4)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(store.read(ref)), expected)
    assert [path.name for path in tmp_path.iterdir()] == [f"{ref.sha256}.png"]


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    store = InputStore(tmp_path)
    assert store.read(store.add(check_picture(encoded("PNG", mode=mode)))).mode == "RGB"


def test_a_turned_photograph_is_upright_and_loses_its_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010E] = "taken at home"
    picture = check_picture(encoded("JPEG", exif=exif.tobytes()))
    assert (picture.ref.width, picture.ref.height) == (4, 6)
    assert b"taken at home" not in picture.png


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", encoded("GIF"), encoded("BMP"), encoded("TIFF"), encoded("PNG")[:60], b"\x80\x04cos\nsystem\n"],
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="PNG, JPEG, WEBP") as caught:
        check_picture(data)
    assert caught.value.param == "image_path"


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
    (tmp_path / f"{ref.sha256}.png").write_bytes(encoded("PNG", (9, 9)))
    with pytest.raises(JobFailed, match="not the one"):
        store.read(ref)


def test_a_sweep_keeps_what_is_used_or_fresh(tmp_path: Path) -> None:
    store = InputStore(tmp_path)
    used, fresh, old = (store.add(check_picture(encoded("PNG", (n, n)))) for n in (3, 4, 5))
    for ref in (used, old):
        os.utime(tmp_path / f"{ref.sha256}.png", (0, 0))
    store.sweep([used])
    assert {path.stem for path in tmp_path.iterdir()} == {used.sha256, fresh.sha256}
