"""Previews: when they are made, what they show, how they are encoded, which VAEs have factors."""

from __future__ import annotations

import importlib.util
import io
import json
import queue
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from safelight.configs.families import identify, no_previews
from safelight.configs.families.latent_rgb import FILE, FLUX_1, WAN_2_1, factors_of
from safelight.configs.previews import preview_steps
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.jobs import load_tokenizer, request_of
from safelight.runtime import hub
from safelight.runtime.errors import ModelError, ProtocolError
from safelight.runtime.messages import (
    GenerationRequest,
    MediaFormat,
    MediaSpec,
    OpenJob,
    PreviewMade,
    PreviewReady,
    TensorRef,
)
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.output.media import Frames
from safelight.runtime.output.previews import MAX_WAITING, Previews
from safelight.runtime.output.previews import encode as encode_preview
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.preview import LatentColours, predicted_x0
from safelight.runtime.pipelines.protocol import DenoiseState, Pipeline, SamplerState
from safelight.runtime.samplers import SAMPLERS, FlowConfig

JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
REQUEST = GenerationRequest("p", "", {}, 16, 16, 9, 8, 6, 1.0, 7, 1, "euler", MediaSpec(MediaFormat.MP4))


# ---- when


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [(3, 20, (5, 10, 15)), (2, 20, (7, 14)), (1, 1, (1,)), (2, 4, (2, 3)), (3, 2, (1, 2)), (0, 9, ())],
)
def test_previews_are_spread_over_the_steps(count: int, steps: int, expected: tuple[int, ...]) -> None:
    assert preview_steps(count, steps) == expected


@given(st.integers(0, 10**9), st.integers(1, 300))
def test_as_many_steps_as_asked_for_each_a_step_of_its_own(count: int, steps: int) -> None:
    found = preview_steps(count, steps)
    assert len(found) == min(count, steps)
    assert list(found) == sorted(set(found))
    assert all(1 <= step <= steps for step in found)
    gaps = np.diff([0, *found, steps + (count >= steps)])
    assert gaps.max() - gaps.min() <= 1


# ---- what


def state_of(latents: torch.Tensor, sigmas: torch.Tensor, step: int, memory: SamplerState) -> DenoiseState:
    return DenoiseState(latents, step, sigmas, memory, torch.empty(0), 1.0, None, REQUEST, 0)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_the_prediction_is_where_the_latest_velocity_points(sampler: str) -> None:
    """A model that always knows the picture: whatever the noise, its prediction is the picture after any step."""
    generator = torch.Generator().manual_seed(0)
    picture, x = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(2))
    method, memory = SAMPLERS[sampler](FlowConfig(sampler, shift=3.0)), SamplerState()
    sigmas = method.schedule(6).sigmas
    assert predicted_x0(state_of(x, sigmas, 0, memory)) is None
    for step in range(6):
        velocity = (x - picture) / sigmas[step]
        x, memory = method.step(sigmas.tolist(), step, x, velocity, memory)
        predicted = predicted_x0(state_of(x, sigmas, step + 1, memory))
        assert predicted is not None
        torch.testing.assert_close(predicted, picture, atol=1e-4, rtol=1e-4)
        if step < 3:
            assert (x - picture).abs().max() > 0.1, "the latents themselves are still far from it"


def test_later_latent_frames_may_have_a_map_of_their_own() -> None:
    first, later = (LatentColours(torch.full((2, 3), value), torch.zeros(3)) for value in (1.0, -1.0))
    colours = replace(first, later=later)
    for frames, expected in ((1, 255), (2, 0), (5, 0)):
        x = torch.ones(2, frames, 1, 1)
        state = state_of(x, torch.tensor([1.0, 0.0]), 1, SamplerState(velocity=x))
        assert colours.preview(state).flatten().tolist() == [expected] * 3  # type: ignore[union-attr]


def test_the_middle_frame_goes_through_the_matrix() -> None:
    colours = LatentColours(torch.tensor([[1.0, 0, 0], [0, 0.5, -1]]), torch.tensor([0.0, 0.0, 0.0]))
    latents = torch.zeros(2, 3, 1, 2)
    latents[:, 1, 0, 0] = torch.tensor([1.0, 1.0])
    latents[:, 1, 0, 1] = torch.tensor([-9.0, 0.0])
    state = state_of(latents, torch.tensor([1.0, 0.0]), 1, SamplerState(velocity=torch.ones_like(latents)))
    found = colours.preview(state)
    assert found is not None
    assert (found.dtype, found.tolist()) == (torch.uint8, [[[255, 191, 0], [0, 128, 128]]])


# ---- the built-in model


@pytest.fixture(scope="module")
def builtin() -> Pipeline:
    torch.set_num_threads(1)
    options = LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, ParallelMesh.single())
    return load_pipeline(hub.builtin_model(), options)


@torch.inference_mode()
def finished(pipeline: Pipeline, prompt: str, seed: int, steps: int = 8) -> tuple[Any, Any]:
    """(the last of two previews, the frame)."""
    spec = identify(hub.builtin_model())
    params = SamplingParams(prompt=prompt, num_inference_steps=steps, seed=seed).merged_over(spec.defaults)
    request = request_of(load_tokenizer(spec), params, MediaSpec(MediaFormat.PNG))
    state = pipeline.prepare(request, pipeline.encode(request), 0)
    assert pipeline.preview(state) is None
    found = None
    for step in range(1, steps + 1):
        (state,) = pipeline.step([state])
        found = pipeline.preview(state) if step == preview_steps(2, steps)[-1] else found
    assert found is not None
    return found.numpy(), pipeline.decode(state, None)[0].frames[0].numpy()


def alike(one: Any, other: Any) -> float:
    """Correlation of two pictures, both brought to 16x16."""
    small = [
        np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX)).ravel() for picture in (one, other)
    ]
    return float(np.corrcoef(np.stack(small))[0, 1])


def test_a_preview_shows_the_picture_that_comes_and_no_other(builtin: Pipeline) -> None:
    made = [
        finished(builtin, "a red apple on a blue background", 1),
        finished(builtin, "a cat on a pink background", 2),
    ]
    for number, (preview, picture) in enumerate(made):
        assert preview.shape == (16, 16, 3)
        other = made[1 - number][1]
        assert alike(preview, picture) > 0.9
        assert alike(preview, other) < alike(preview, picture) - 0.2


# ---- factors


def vae(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_published_vaes_are_known_by_their_normalisation(tmp_path: Path) -> None:
    mean = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
    mean += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
    wan = {"_class_name": "AutoencoderKLWan", "z_dim": 16, "latents_mean": mean}
    assert factors_of(vae(tmp_path / "a", **wan)) is WAN_2_1
    assert factors_of(vae(tmp_path / "a", **wan | {"_class_name": "AutoencoderKLQwenImage"})) is WAN_2_1
    assert factors_of(vae(tmp_path / "a", **wan | {"latents_mean": [0.0] * 16})) is None
    assert factors_of(vae(tmp_path / "a", **wan | {"z_dim": 48})) is None
    flux = {"_class_name": "AutoencoderKL", "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    assert factors_of(vae(tmp_path / "a", **flux)) is FLUX_1
    assert factors_of(vae(tmp_path / "a", **flux | {"scaling_factor": 0.18215})) is None
    assert factors_of(tmp_path / "nothing") is None
    assert {len(WAN_2_1.matrix), len(FLUX_1.matrix)} == {16}


def test_a_vae_may_bring_its_own_factors(tmp_path: Path) -> None:
    folder = vae(tmp_path / "a", _class_name="AutoencoderKL", latent_channels=2)
    (folder / FILE).write_text(json.dumps({"matrix": [[1, 2, 3], [4, 5, 6]], "bias": [0, 0, 0.5]}))
    found = factors_of(folder)
    assert found is not None
    assert (found.matrix[1], found.bias) == ((4.0, 5.0, 6.0), (0.0, 0.0, 0.5))
    for wrong in ("[]", "{", '{"matrix": [[1, 2, 3]], "bias": [0, 0, 0]}', '{"matrix": [[1, 2]], "bias": [0, 0, 0]}'):
        (folder / FILE).write_text(wrong)
        with pytest.raises(ModelError, match=r"fit_preview\.py"):
            factors_of(folder)


def test_a_model_says_why_it_makes_none(tmp_path: Path) -> None:
    spec = identify(hub.builtin_model())
    assert no_previews(spec) is None
    other = vae(tmp_path / "a", _class_name="AutoencoderKLWan", latents_mean=[0.0] * 16)
    assert "fit_preview.py" in str(no_previews(spec, str(other)))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    assert "diffusers" in str(no_previews(identify(tmp_path / "d")))


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fit_finds_the_map_that_made_the_colours(tmp_path: Path) -> None:
    fit, generator = script("fit_preview"), torch.Generator().manual_seed(0)
    matrix, bias = torch.randn(4, 3, generator=generator), torch.tensor([0.1, -0.2, 0.3])
    latents = [torch.randn(4, 5, 6, generator=generator) for _ in range(3)]
    pairs = [
        (x, ((x.permute(1, 2, 0) @ matrix + bias).permute(2, 0, 1)).repeat_interleave(8, 1).repeat_interleave(8, 2))
        for x in latents
    ]
    found = fit.fit(pairs)
    assert found[2] > 0.999
    (tmp_path / FILE).write_text(fit.as_json(*found[:2], later=fit.as_json(-matrix, bias)))
    factors = factors_of(tmp_path)
    assert factors is not None
    assert factors.later is not None
    torch.testing.assert_close(torch.tensor(factors.later.matrix), -matrix, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.tensor(factors.matrix), matrix, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="more or larger"):
        fit.fit([(latents[0][:, :1, :2], pairs[0][1][:, :8, :16])])


# ---- encoded


def ready(height: int, width: int, number: int = 0, **changes: Any) -> tuple[PreviewReady, tuple[memoryview, ...]]:
    pixels = np.full((height, width, 3), (200, 30, 60), np.uint8)
    values: dict[str, Any] = {
        "shape": pixels.shape,
        "dtype": "uint8",
        "nbytes": pixels.nbytes,
        "crc32": zlib.crc32(pixels.data),
    }
    return PreviewReady(JOB, 0, 0, number, 1, TensorRef(**values | changes)), (pixels.data.cast("B"),)


@pytest.mark.parametrize(
    ("format", "picture", "latents", "expected"),
    [
        (MediaFormat.PNG, (128, 128), (16, 16), ("image/png", (128, 128))),
        (MediaFormat.JPEG, (1024, 1024), (128, 128), ("image/jpeg", (256, 256))),
        (MediaFormat.WEBP, (480, 832), (60, 104), ("image/webp", (256, 148))),
        (MediaFormat.MP4, (480, 832), (60, 104), ("image/jpeg", (256, 148))),
        (MediaFormat.NPY, (4096, 4096), (512, 512), ("image/jpeg", (512, 512))),
    ],
)
def test_a_preview_is_a_small_file_in_the_format_of_the_picture(
    format: MediaFormat, picture: tuple[int, int], latents: tuple[int, int], expected: tuple[str, tuple[int, int]]
) -> None:
    woken: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        previews = Previews(pool, lambda: woken.append(1))
        previews.add(*ready(*latents), OpenJob(JOB, "me", MediaSpec(format), 8, 1, *picture, 1))
    ((attempt, made, data),) = previews.collect()
    assert (attempt, made.media_type, (made.width, made.height), made.nbytes) == (0, *expected, len(data))
    with Image.open(io.BytesIO(data)) as image:
        assert Image.MIME[str(image.format)] == expected[0]
        assert image.size == expected[1]
        assert np.abs(np.asarray(image.convert("RGB")).mean((0, 1)) - (200, 30, 60)).max() < 3
    assert woken == [1]


def test_what_is_not_as_described_is_refused_and_too_many_are_left_out() -> None:
    job = OpenJob(JOB, "me", MediaSpec(MediaFormat.PNG), 8, 1, 128, 128, 1)
    pool = ThreadPoolExecutor(1)
    previews = Previews(pool, lambda: None)
    wrong: list[dict[str, Any]] = [
        {"shape": (4, 4)}, {"shape": (4, 5, 3)}, {"shape": (0, 4, 3)}, {"shape": (4, 4, 3, 1)},
        {"shape": (10**6, 4, 3)}, {"dtype": "float32"}, {"nbytes": 9}, {"crc32": 1},
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(ProtocolError):
            previews.add(*ready(4, 4, **changes), job)
    with pytest.raises(ProtocolError):
        previews.add(ready(4, 4)[0], (), job)
    for number in range(MAX_WAITING + 5):  # nobody collects
        previews.add(*ready(4, 4, number), job)
    pool.shutdown()
    assert [made.number for _, made, _ in previews.collect()] == list(range(MAX_WAITING))


def test_previews_are_collected_in_order_when_the_later_is_encoded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    job = OpenJob(JOB, "me", MediaSpec(MediaFormat.PNG), 8, 1, 128, 128, 1)
    slow, encoded = threading.Event(), queue.SimpleQueue[int]()

    def encode(message: PreviewReady, pixels: Frames, job: OpenJob) -> tuple[PreviewMade, bytes]:
        assert message.number > 0 or slow.wait(60)
        return encode_preview(message, pixels, job)

    monkeypatch.setattr("safelight.runtime.output.previews.encode", encode)
    with ThreadPoolExecutor(2) as pool:
        previews = Previews(pool, lambda: encoded.put(1))
        for number in range(3):
            previews.add(*ready(4, 4, number), job)
        for _ in range(2):
            encoded.get(timeout=60)
        assert previews.collect() == []
        slow.set()
        encoded.get(timeout=60)
        assert [made.number for _, made, _ in previews.collect()] == [0, 1, 2]
