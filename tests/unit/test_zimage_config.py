"""What the Z-Image family says without torch: which checkpoint this is, which requests are valid, what they cost."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from safelight.configs.families import FAMILIES, ModelSpec, identify
from safelight.configs.families.zimage import BASE, TURBO, validate
from safelight.configs.families.zimage_costs import profile
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.plan import find_model
from safelight.runtime.errors import InvalidRequest, ModelError, UnsupportedModel

INDEX = {"_class_name": "ZImagePipeline"}
FILES: dict[str, dict[str, Any]] = {
    "transformer/config.json": {"_class_name": "ZImageTransformer2DModel", "dim": 3840, "cap_feat_dim": 2560},
    "vae/config.json": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16},
    "text_encoder/config.json": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 151936,
    },
    "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}  # fmt: skip


def write(root: Path, files: Mapping[str, Mapping[str, Any]]) -> Path:
    for name, values in {"model_index.json": INDEX, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(values), encoding="utf-8")
    return root


def changed(name: str, **settings: Any) -> dict[str, dict[str, Any]]:
    files = copy.deepcopy(FILES)
    files[name] |= settings
    return files


@pytest.fixture
def turbo(tmp_path: Path) -> ModelSpec:
    return identify(write(tmp_path, FILES))


def params(spec: ModelSpec, **settings: Any) -> SamplingParams:
    return SamplingParams(**settings).merged_over(spec.defaults)


def test_the_checkpoints_are_told_apart_by_their_schedules(tmp_path: Path) -> None:
    turbo = identify(write(tmp_path / "turbo", FILES))
    base = identify(write(tmp_path / "base", changed("scheduler/scheduler_config.json", shift=6.0)))
    assert (turbo.family, turbo.variant, base.variant) == ("zimage", TURBO.name, BASE.name)
    assert (turbo.defaults.num_inference_steps, turbo.defaults.guidance_scale) == (8, 0.0)
    assert (base.defaults.num_inference_steps, base.defaults.guidance_scale) == (50, 4.0)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("transformer/config.json", {"siglip_feat_dim": 1152}, "reads pictures"),
        ("transformer/config.json", {"in_channels": 32}, "16 latent channels expected"),
        ("vae/config.json", {"latent_channels": 4}, "16 latent channels expected"),
    ],
)
def test_relatives_are_left_to_the_diffusers_backend(
    tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        identify(write(tmp_path, changed(name, **settings)), "safelight")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("transformer/config.json", {"n_layers": 0}, "n_layers must be a positive integer"),
        ("transformer/config.json", {"axes_dims": [32, 48]}, "axes_dims must be a list of 3"),
        ("text_encoder/config.json", {"hidden_size": 1024}, "of one model"),
        ("text_encoder/config.json", {"vocab_size": None}, "vocab_size must be a positive integer"),
    ],
)
def test_a_broken_config_is_named(tmp_path: Path, name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        identify(write(tmp_path, changed(name, **settings)))


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"height": 1000}, "height", "multiple of 16; got 1000, the nearest are 992 and 1008"),
        ({"width": 8208}, "width", "from 16 to 8192"),
        ({"num_frames": 5}, "num_frames", "must be 1, Z-Image-Turbo makes pictures"),
        ({"guidance_scale": -1.0}, "guidance_scale", "from 0"),
        ({"sampler": "unipc"}, "sampler", "one of euler"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale", "guidance_scale"),
        ({"negative_prompt": "bad"}, "negative_prompt", "does nothing without guidance"),
        ({"cfg_truncation": 0.5}, "cfg_truncation", "does nothing without guidance"),
        ({"num_inference_steps": 0}, "num_inference_steps", "from 1"),
    ],
)
def test_a_wrong_value_is_named_with_the_nearest_right_ones(
    turbo: ModelSpec, settings: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        validate(turbo, params(turbo, **settings))
    assert caught.value.param == param


def test_every_multiple_of_16_is_valid(turbo: ModelSpec) -> None:
    for height, width in ((16, 8192), (1360, 768), (720, 1280), (1024, 1024)):
        validate(turbo, params(turbo, height=height, width=width))


def test_costs_grow_with_size_text_and_guidance(turbo: ModelSpec) -> None:
    plain = profile(turbo, params(turbo))
    assert plain.tokens == 4096
    assert plain.phases[0].step_cost == pytest.approx(56.5, rel=0.05)  # 6.15 G parameters, 4096 tokens, attention
    guided = profile(turbo, params(turbo, guidance_scale=3.0))
    assert guided.phases[0].step_cost == pytest.approx(2 * plain.phases[0].step_cost)
    assert guided.phases[0].batch_key.guided
    assert not plain.phases[0].batch_key.guided
    wordy = profile(turbo, params(turbo, prompt="word " * 400))
    assert wordy.phases[0].step_cost > plain.phases[0].step_cost
    assert wordy.phases[0].batch_key == plain.phases[0].batch_key
    assert profile(turbo, params(turbo, height=512)).phases[0].step_cost < plain.phases[0].step_cost


def test_a_layout_can_be_planned_without_the_files() -> None:
    spec = find_model("Z-Image")
    family = FAMILIES[spec.family]
    assert family.guided_by_default(spec)
    assert not family.guided_by_default(find_model("Tongyi-MAI/Z-Image-Turbo"))
    attention = family.attention_of(spec)
    assert (attention.heads, attention.head_dim, attention.layers) == (30, 128, 32)
    assert dataclasses.replace(spec, root=Path()).variant == "Z-Image"
