"""Every format decoded again and compared with the frames that went in."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from safelight.runtime.errors import InvalidRequest
from safelight.runtime.messages import MediaFormat, MediaSpec, OpenJob
from safelight.runtime.output.media import Frames, extension, open_encoder

JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
RED, BLUE = (214, 32, 40), (20, 40, 200)


def scene(count: int, height: int = 64, width: int = 96) -> Frames:
    """A red square that moves to the right on blue."""
    frames = np.full((count, height, width, 3), BLUE, np.uint8)
    for number, frame in enumerate(frames):
        frame[16:48, 8 + 4 * number : 40 + 4 * number] = RED
    return frames


def written(path: Path, format: MediaFormat, frames: Frames, fps: int = 16, quality: int | None = None) -> Path:
    count, height, width, _ = frames.shape
    job = OpenJob(JOB, "me", MediaSpec(format, quality), fps, count, height, width, 1)
    path = path / f"out.{extension(format)}"
    path.touch()
    encoder = open_encoder(path, format, job)
    encoder.add(frames[:1])
    if count > 1:
        encoder.add(frames[1:])
    encoder.finish()
    return path


def decoded_video(path: Path) -> tuple[Frames, float, str]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate or 0), str(stream.codec_context.pix_fmt)


def error(a: Frames, b: Frames) -> float:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())


def test_png_is_exact(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 37, 53, 3), dtype=np.uint8)
    with Image.open(written(tmp_path, MediaFormat.PNG, frames)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(image), frames[0])


@pytest.mark.parametrize("format", [MediaFormat.JPEG, MediaFormat.WEBP])
def test_lossy_stills_are_close_and_quality_sets_their_size(tmp_path: Path, format: MediaFormat) -> None:
    noise = np.random.default_rng(0).normal(0, 12, (1, 64, 96, 1))
    frames = (scene(1) + noise).clip(0, 255).astype(np.uint8)
    path = written(tmp_path, format, frames)
    with Image.open(path) as image:
        assert image.format == format.value.upper()
        assert error(np.asarray(image.convert("RGB")), frames[0]) < 8
    normal = path.stat().st_size
    assert written(tmp_path, format, frames, quality=20).stat().st_size < normal
    assert written(tmp_path, format, frames, quality=100).stat().st_size > normal


@pytest.mark.parametrize("count", [1, 2, 17])
@pytest.mark.parametrize("fps", [16, 30])
def test_mp4_has_all_frames_at_their_size_rate_and_colours(tmp_path: Path, count: int, fps: int) -> None:
    frames = scene(count)
    path = written(tmp_path, MediaFormat.MP4, frames, fps)
    found, rate, pixels = decoded_video(path)
    assert found.shape == frames.shape
    assert rate == pytest.approx(fps)
    assert pixels == "yuv420p"
    assert error(found, frames) < 3
    assert error(found[-1, 4, 48], np.array(BLUE, np.uint8)) < 6
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")  # plays while it downloads


@pytest.mark.parametrize(("height", "width"), [(63, 96), (64, 97)])
def test_mp4_of_an_odd_size_keeps_that_size(tmp_path: Path, height: int, width: int) -> None:
    frames = scene(3, height, width)
    found, _, pixels = decoded_video(written(tmp_path, MediaFormat.MP4, frames))
    assert found.shape == frames.shape
    assert pixels == "yuv444p"
    assert error(found, frames) < 3


def test_several_frames_to_webp_are_an_animation_of_the_right_length(tmp_path: Path) -> None:
    frames = scene(9)
    with Image.open(written(tmp_path, MediaFormat.WEBP, frames, fps=24)) as image:
        assert getattr(image, "n_frames", 1) == 9
        total = 0
        for number in range(9):
            image.seek(number)
            assert error(np.asarray(image.convert("RGB")), frames[number]) < 4
            total += image.info["duration"]
    assert total == 375
    assert [p.name for p in tmp_path.iterdir()] == ["out.webp"]


def test_npy_is_exact(tmp_path: Path) -> None:
    frames = scene(5)
    assert np.array_equal(np.load(written(tmp_path, MediaFormat.NPY, frames), allow_pickle=False), frames)


@pytest.mark.parametrize("format", [MediaFormat.PNG, MediaFormat.JPEG])
def test_several_frames_to_a_still_format_are_refused(tmp_path: Path, format: MediaFormat) -> None:
    with pytest.raises(InvalidRequest, match="holds one frame, this output has 2: ask for mp4"):
        written(tmp_path, format, scene(2))


@pytest.mark.parametrize("format", [MediaFormat.MP4, MediaFormat.WEBP, MediaFormat.NPY])
def test_encoder_can_be_aborted_at_any_point(tmp_path: Path, format: MediaFormat) -> None:
    job = OpenJob(JOB, "me", MediaSpec(format), 16, 5, 64, 96, 1)
    for fed in (0, 2):
        path = tmp_path / f"{fed}"
        path.touch()
        encoder = open_encoder(path, format, job)
        encoder.add(scene(5)[:fed])
        encoder.abort()
        encoder.abort()
