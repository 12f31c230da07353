"""What the Wan family says without torch: which checkpoint this is, which requests are valid, what they cost."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.configs.families import FAMILIES, ModelSpec, identify
from safelight.configs.families.wan import NEGATIVE_PROMPT, validate
from safelight.configs.families.wan_costs import profile
from safelight.runtime.errors import InvalidRequest, ModelError

INDEX = {"_class_name": "WanPipeline", "transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False}
WAN_1_3B: dict[str, dict[str, Any]] = {
    "transformer/config.json": {
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "num_layers": 30,
        "ffn_dim": 8960,
        "in_channels": 16,
        "text_dim": 4096,
        "patch_size": [1, 2, 2],
        "rope_max_seq_len": 1024,
        "image_dim": None,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKLWan",
        "base_dim": 96,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "z_dim": 16,
    },
    "text_encoder/config.json": {"d_model": 4096, "num_layers": 24, "num_heads": 64, "d_kv": 64, "d_ff": 10240},
    "scheduler/scheduler_config.json": {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0},
}
Files = Mapping[str, Mapping[str, Any]]


def write(root: Path, files: Files, index: Mapping[str, Any] = INDEX) -> Path:
    for name, values in {"model_index.json": index, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(values), encoding="utf-8")
    return root


def changed(name: str, **settings: Any) -> dict[str, dict[str, Any]]:
    files = copy.deepcopy(WAN_1_3B)
    files[name] |= settings
    return files


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return identify(write(tmp_path_factory.mktemp("wan"), WAN_1_3B))


def test_the_published_checkpoints_are_recognised_with_their_defaults(tmp_path: Path, spec: ModelSpec) -> None:
    assert spec.variant == "Wan2.1-T2V-1.3B"
    large = changed("transformer/config.json", num_attention_heads=40, num_layers=40, ffn_dim=13824)
    larger = identify(write(tmp_path, large))
    assert larger.variant == "Wan2.1-T2V-14B"
    assert (spec.defaults.guidance_scale, larger.defaults.guidance_scale) == (6.0, 5.0)
    for defaults in (spec.defaults, larger.defaults):
        assert (defaults.height, defaults.width, defaults.num_frames, defaults.fps) == (480, 832, 81, 16)
        assert (defaults.num_inference_steps, defaults.sampler) == (50, "unipc")
        assert defaults.negative_prompt == NEGATIVE_PROMPT


def test_the_built_in_and_other_models_have_small_defaults(tmp_path: Path) -> None:
    small = changed("transformer/config.json", num_attention_heads=4, num_layers=8)
    custom = identify(write(tmp_path / "a", small))
    assert (custom.variant, custom.defaults.height) == ("custom", 128)
    write(tmp_path / "b", small)
    (tmp_path / "b" / "vocabulary.json").write_text("[]", encoding="utf-8")
    builtin = identify(tmp_path / "b")
    assert (builtin.variant, builtin.defaults.width, builtin.defaults.num_frames) == ("builtin", 128, 1)
    wide = changed("transformer/config.json", num_layers=20)
    assert identify(write(tmp_path / "c", wide)).defaults.height == 480


def test_the_default_sampler_is_the_one_of_the_checkpoint(tmp_path: Path) -> None:
    files = changed("scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    assert identify(write(tmp_path, files)).defaults.sampler == "euler"


def test_every_default_is_valid_and_has_a_profile(spec: ModelSpec) -> None:
    for variant in FAMILIES["wan"].variants:
        params = variant.defaults
        validate(spec, params)
        assert profile(spec, params).total_cost > 0
        unset = {f.name for f in dataclasses.fields(params) if getattr(params, f.name) is None}
        assert unset == {"seed", "true_cfg_scale"}


@pytest.mark.parametrize(
    ("index", "files", "message"),
    [
        (INDEX | {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, WAN_1_3B, "two transformers"),
        (INDEX | {"boundary_ratio": 0.875}, WAN_1_3B, "two transformers"),
        (INDEX | {"expand_timesteps": True}, WAN_1_3B, "expand_timesteps"),
        (INDEX, changed("transformer/config.json", image_dim=1280, in_channels=36), "image to video"),
        (INDEX, changed("transformer/config.json", in_channels=48), "in_channels 48"),
        (INDEX, changed("vae/config.json", z_dim=48, patch_size=2), "VAE of Wan 2.1"),
        (INDEX, changed("text_encoder/config.json", d_model=1024), "text encoder is 1024 wide"),
        (INDEX | {"_class_name": "FluxPipeline"}, WAN_1_3B, "WanPipeline"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path: Path, index: Any, files: Files, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        identify(write(tmp_path, files, index), "safelight")


@pytest.mark.parametrize("name", sorted(WAN_1_3B))
@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "{}", '"text"', "\x00"])
def test_a_missing_or_broken_component_config_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    path = write(tmp_path, WAN_1_3B) / name
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=path.name):
        identify(tmp_path)


@pytest.mark.parametrize("bad", ["12", None, -1, 0, 1.5, [12], True])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("transformer/config.json", "num_attention_heads"),
        ("transformer/config.json", "ffn_dim"),
        ("text_encoder/config.json", "num_layers"),
        ("vae/config.json", "dim_mult"),
        ("transformer/config.json", "patch_size"),
    ],
)
def test_a_wrong_number_in_a_component_config_is_named(tmp_path: Path, name: str, field: str, bad: object) -> None:
    with pytest.raises(ModelError, match=field):
        identify(write(tmp_path, changed(name, **{field: bad})))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("height", 481, "480 and 496"),
        ("width", 833, "832 and 848"),
        ("height", 8, "from 16"),
        ("height", 0, "from 16"),
        ("width", -16, "from 16"),
        ("width", 16400, "to 16384"),
        ("width", 16, None),
        ("height", 16384, None),
        ("num_frames", 80, "77 and 81"),
        ("num_frames", 2, "1 and 5"),
        ("num_frames", 0, "from 1"),
        ("num_frames", 4093, None),
        ("num_frames", 4097, "to 4093"),
        ("num_inference_steps", 0, "from 1"),
        ("num_inference_steps", 1001, "to 1000"),
        ("guidance_scale", -0.5, "from 0"),
        ("guidance_scale", float("nan"), "from 0"),
        ("guidance_scale", float("inf"), "from 0"),
        ("guidance_scale", 0.0, None),
        ("true_cfg_scale", 4.0, "takes no true_cfg_scale"),
        ("fps", 0, "from 1"),
        ("num_outputs_per_prompt", 0, "from 1"),
        ("num_outputs_per_prompt", 17, "to 16"),
        ("seed", -1, "from 0"),
        ("seed", 2**63, "from 0"),
        ("seed", 0, None),
        ("sampler", "ddim", "unipc, euler"),
        ("sampler", "euler", None),
        ("prompt", "a" * 20_001, "20000 characters"),
    ],
)
def test_wrong_parameters_are_named_with_the_nearest_right_ones(
    spec: ModelSpec, field: str, value: Any, message: str | None
) -> None:
    params = dataclasses.replace(spec.defaults, **{field: value})
    if message is None:
        validate(spec, params)
        return
    with pytest.raises(InvalidRequest, match=message) as caught:
        validate(spec, params)
    assert caught.value.param == field


@given(value=st.integers(-100, 20_000), field=st.sampled_from(["height", "width", "num_frames"]))
def test_the_nearest_values_named_are_valid_and_nearest(spec: ModelSpec, value: int, field: str) -> None:
    step, offset = (4, 1) if field == "num_frames" else (16, 0)
    settings: dict[str, Any] = {field: value}
    params = dataclasses.replace(spec.defaults, **settings)
    try:
        validate(spec, params)
    except InvalidRequest as error:
        named = [int(word) for word in error.message.partition("nearest are ")[2].split(" and ") if word]
        assert all(abs(n - value) < step and n % step == offset for n in named)
        for n in named:
            settings[field] = n
            validate(spec, dataclasses.replace(params, **settings))
        assert named or not (offset or step) <= value <= (4093 if offset else 16384)
    else:
        assert value % step == offset


@pytest.fixture
def cost(spec: ModelSpec) -> Callable[..., Any]:
    def compute(**settings: Any) -> Any:
        return profile(spec, dataclasses.replace(spec.defaults, **settings))

    return compute


def test_the_profile_of_a_published_request_has_known_figures(cost: Callable[..., Any]) -> None:
    """283 TFLOP a forward: 446 ms at the 635 TFLOP/s that one H100 reaches (a measured floor)."""
    made = cost()
    assert made.latent_shape == (16, 21, 60, 104)
    assert made.tokens == 32_760
    assert made.chunk_frames == (1,) + (4,) * 20
    assert sum(made.chunk_frames) == 81
    assert made.chunk_bytes == 4 * 480 * 832 * 3
    assert made.phases[0].step_cost / 2 == pytest.approx(283, rel=0.02)
    assert made.state_bytes == 4 * 4 * 16 * 21 * 60 * 104
    gib = 2**30
    assert 2 * gib < made.step_peak_bytes < 12 * gib
    assert 4 * gib < made.decode_peak_bytes < 20 * gib


def test_guidance_doubles_a_step_and_changes_the_batch_key(cost: Callable[..., Any]) -> None:
    on, off = cost(guidance_scale=5.0), cost(guidance_scale=1.0)
    assert on.phases[0].step_cost == 2 * off.phases[0].step_cost
    assert on.phases[0].batch_key != off.phases[0].batch_key
    assert on.phases[0].batch_key == cost(guidance_scale=3.0, num_inference_steps=7).phases[0].batch_key


def test_a_longer_or_larger_request_costs_more(cost: Callable[..., Any]) -> None:
    base = cost()
    for more in (cost(num_frames=85), cost(width=848), cost(num_inference_steps=51), cost(num_outputs_per_prompt=2)):
        assert more.total_cost > base.total_cost
    assert cost(num_frames=85).peak_bytes >= base.peak_bytes
