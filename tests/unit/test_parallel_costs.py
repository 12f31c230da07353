"""Predicted traffic and seconds of a step, and the plan that `doctor` prints."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.configs.families import FAMILIES
from safelight.configs.parallel import Degrees, WantedDegrees
from safelight.configs.parallel_costs import H200, predict
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.traffic import StepShape, step_traffic, whole_text_traffic
from safelight.entrypoints.plan import find_model, show, step_shape
from safelight.runtime.errors import ConfigError

WAN_1_3B = StepShape(tokens=32760, heads=12, head_dim=128, layers=30, prediction_channels=64)
TFLOP = 566.0


def test_one_gpu_takes_what_was_measured() -> None:
    """docs/benchmarks/parallel.md: a guided step of 992.6 ms."""
    assert predict(WAN_1_3B, TFLOP, Degrees(), H200).seconds == pytest.approx(0.9926, rel=0.02)


@pytest.mark.parametrize(("degrees", "measured_ms"), [((2, 1, 1), 499.1), ((1, 1, 2), 519.1), ((1, 2, 1), 546.8)])
def test_two_gpus_take_what_was_measured(degrees: tuple[int, int, int], measured_ms: float) -> None:
    """docs/benchmarks/parallel.md: Wan 1.3B at 480p on two H200."""
    assert predict(WAN_1_3B, TFLOP, Degrees(*degrees), H200).seconds == pytest.approx(measured_ms / 1e3, rel=0.04)


@pytest.mark.parametrize(
    ("model", "side", "degrees", "measured_ms", "within"),
    [
        ("FLUX.1-dev", 1024, (1, 1, 1), 122.4, 0.04),
        ("FLUX.1-dev", 1024, (1, 1, 2), 70.0, 0.04),
        ("FLUX.1-dev", 1024, (1, 2, 1), 77.6, 0.08),
        ("FLUX.1-dev", 2048, (1, 1, 2), 368.7, 0.04),
        ("Qwen-Image", 1024, (1, 1, 1), 235.8, 0.04),
        ("Qwen-Image", 1024, (2, 1, 1), 121.0, 0.04),
        ("Qwen-Image", 1024, (1, 1, 2), 137.6, 0.06),
        ("Qwen-Image", 1024, (1, 2, 1), 155.9, 0.12),
        ("Qwen-Image", 2048, (1, 1, 2), 784.8, 0.04),
    ],
)
def test_pictures_take_what_was_measured(
    model: str, side: int, degrees: tuple[int, int, int], measured_ms: float, within: float
) -> None:
    """docs/benchmarks/parallel.md: two H200."""
    spec = find_model(model)
    params = SamplingParams(height=side, width=side).merged_over(spec.defaults)
    cost = FAMILIES[spec.family].profile(spec, params).phases[0].step_cost
    predicted = predict(step_shape(spec, params), cost, Degrees(*degrees), H200).seconds
    assert predicted == pytest.approx(measured_ms / 1e3, rel=within)


@given(st.integers(1, 4096), st.sampled_from(WantedDegrees(8, 8).layouts()))
def test_matrices_that_only_text_meets_are_read_whole_by_every_rank(text: int, degrees: Degrees) -> None:
    shape = StepShape(tokens=4096 + text, heads=24, head_dim=128, layers=60, prediction_channels=64)
    own = replace(shape, text=text, text_weights=6_800_000_000)
    more = predict(own, 100.0, degrees, H200).seconds - predict(shape, 100.0, degrees, H200).seconds
    read = 2 * own.text_weights / H200.memory * own.branches / degrees.cfg
    assert 0 <= more <= read
    assert more > 0 or text / degrees.sp > 100


def test_stores_into_peers_memory_are_faster_than_messages_and_end_at_the_host() -> None:
    messages = replace(H200, peer_link=0.0)
    for degrees in (Degrees(1, 1, 2), Degrees(2, 1, 4)):
        assert predict(WAN_1_3B, TFLOP, degrees, H200).seconds < predict(WAN_1_3B, TFLOP, degrees, messages).seconds
    wide, small = Degrees(1, 1, 4), replace(H200, gpus_per_host=2)
    assert predict(WAN_1_3B, TFLOP, wide, small) == predict(WAN_1_3B, TFLOP, wide, replace(small, peer_link=0.0))


@pytest.mark.parametrize("world", [2, 4, 8, 16, 64])
def test_more_gpus_are_faster_and_less_efficient(world: int) -> None:
    one = predict(WAN_1_3B, TFLOP, Degrees(), H200)
    for degrees in WantedDegrees(world, world).layouts():
        step = predict(WAN_1_3B, TFLOP, degrees, H200)
        if degrees.ulysses <= WAN_1_3B.heads:
            assert one.seconds / world < step.seconds < one.seconds
            assert 0 < step.efficiency(one, world) < 1


def test_uneven_heads_cost_what_the_fullest_rank_takes() -> None:
    even, uneven = (predict(WAN_1_3B, TFLOP, Degrees(1, 1, u), H200).seconds for u in (6, 7))
    assert uneven > 0.9 * even  # both have a rank with two heads


@given(
    st.integers(1, 500), st.integers(1, 16), st.sampled_from([*WantedDegrees(8, 8).layouts(), Degrees(1, 3, 2)]),
    st.integers(1, 3), st.integers(1, 2),
)  # fmt: skip
def test_what_all_ranks_send_adds_up(tokens: int, heads: int, degrees: Degrees, batch: int, branches: int) -> None:
    shape = StepShape(tokens, heads, 4, 1, prediction_channels=1, batch=batch, branches=branches, item_bytes=1)
    sent = [step_traffic(shape, degrees, rank) for rank in range(degrees.world_size)]
    runs = batch * (branches if branches == 2 or degrees.cfg == 1 else degrees.cfg)  # unguided: both halves compute
    assert sum(t.gather for t in sent) == runs * tokens * (degrees.sp - 1)
    assert sum(t.ring for t in sent) == runs * 2 * 4 * heads * tokens * (degrees.ring - 1)
    assert sum(t.cfg for t in sent) == (4 * batch * tokens * degrees.world_size if branches == degrees.cfg == 2 else 0)
    assert degrees.ulysses > 1 or sum(t.ulysses for t in sent) == 0


def test_a_ring_of_one_and_one_rank_send_nothing() -> None:
    assert step_traffic(WAN_1_3B, Degrees(), 0).total == 0
    assert step_traffic(WAN_1_3B, Degrees(1, 1, 4), 0).ring == 0
    assert step_traffic(WAN_1_3B, Degrees(1, 4, 1), 0).ulysses == 0


def test_the_plan_shows_layout_reasons_and_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    show("Wan2.1-T2V-14B", 8, False)
    text = capsys.readouterr().out
    assert "cfg 2 x ring 1 x ulysses 4" in text
    assert "40 heads" in text
    assert "ms a step" in text
    show("Wan-AI/Wan2.1-T2V-14B-Diffusers", 8, True)
    plan = json.loads(capsys.readouterr().out)
    assert plan["degrees"] == {"cfg": 2, "ring": 1, "ulysses": 4}
    assert plan["step"]["seconds"] < plan["alone"]["seconds"]


def test_an_unknown_model_to_plan_for_is_named() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'Wan2\.1-T2V-14B'"):
        find_model("Wan2.1-14B")


FLUX = StepShape(tokens=512 + 4096, heads=24, head_dim=128, layers=57, prediction_channels=64, branches=1)


@pytest.mark.parametrize(("ulysses", "cut_sends_less"), [(2, False), (4, False), (8, True)])
def test_text_that_is_cut_sends_less_than_whole_text_from_many_ulysses_ranks_on(
    ulysses: int, cut_sends_less: bool
) -> None:
    degrees = Degrees(1, 1, ulysses)
    cut = max(step_traffic(FLUX, degrees, rank).ulysses for rank in range(ulysses))
    whole = max(whole_text_traffic(FLUX, 512, degrees, rank).ulysses for rank in range(ulysses))
    assert (cut < whole) == cut_sends_less
    assert whole_text_traffic(FLUX, 0, degrees, 0) == step_traffic(FLUX, degrees, 0)


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("model", ["builtin", "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "five heads", "tiny"])
def test_every_model_has_a_plan(model: str, num_gpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = {"five heads": 5, "tiny": 2}.get(model)
    if heads is not None:
        model = str(tmp_path)
        for name in ("model_index", "transformer/config", "vae/config", "text_encoder/config"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            builtin = json.loads((find_model("builtin").root / f"{name}.json").read_text())
            changed = {"num_attention_heads": heads} if name == "transformer/config" else {}
            (tmp_path / f"{name}.json").write_text(json.dumps(builtin | changed))
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "UniPCMultistepScheduler"}')
    show(model, num_gpus, True)
    plan = json.loads(capsys.readouterr().out)
    assert math.prod(plan["degrees"].values()) == num_gpus
    assert len(plan["why"]) == 4
    assert plan["step"]["seconds"] > 0
    show(model, num_gpus, False)
    text = capsys.readouterr().out
    assert all(line in text for line in plan["why"])
    assert ("one GPU is faster" in text) == (plan["step"]["seconds"] > plan["alone"]["seconds"])
