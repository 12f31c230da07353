"""What the FLUX family says without torch: which checkpoint this is, which requests are valid, what they cost."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from safelight.configs.families import FAMILIES, ModelSpec, identify
from safelight.configs.families.flux import DEV, SCHNELL, validate
from safelight.entrypoints.plan import find_model, show
from safelight.runtime.errors import InvalidRequest, ModelError, UnsupportedModel

PARTS: dict[str, dict[str, Any]] = {
    "transformer": {**DEV.configs["transformer"]},
    "vae": {**DEV.configs["vae"]},
    "text_encoder": {**DEV.configs["text_encoder"]},
    "text_encoder_2": {**DEV.configs["text_encoder_2"]},
}
INDEX = {"_class_name": "FluxPipeline"}


def write(root: Path, **changed: dict[str, Any]) -> Path:
    """The configs of FLUX.1-dev with some fields changed; a None removes a field."""
    for name, values in copy.deepcopy(PARTS).items():
        kept = {k: v for k, v in (values | changed.get(name, {})).items() if v is not None}
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    (root / "model_index.json").write_text(json.dumps(INDEX), encoding="utf-8")
    return root


@pytest.fixture
def dev() -> ModelSpec:
    return find_model("FLUX.1-dev")


@pytest.fixture
def schnell() -> ModelSpec:
    return find_model("black-forest-labs/FLUX.1-schnell")


def test_published_checkpoints_are_recognised_with_their_defaults(tmp_path: Path) -> None:
    for name, guidance, variant in (("a", True, DEV), ("b", False, SCHNELL), ("c", None, SCHNELL)):
        (tmp_path / name).mkdir()
        spec = identify(write(tmp_path / name, transformer={"guidance_embeds": guidance}))
        assert (spec.family, spec.variant, spec.defaults) == ("flux", variant.name, variant.defaults)
    (tmp_path / "d").mkdir()
    smaller = identify(write(tmp_path / "d", transformer={"num_layers": 8}))
    assert (smaller.variant, smaller.defaults) == ("custom", DEV.defaults)


def test_absent_fields_have_the_values_of_their_classes(tmp_path: Path) -> None:
    absent = dict.fromkeys(DEV.configs["transformer"]) | {"patch_size": 1}
    spec = identify(write(tmp_path, transformer=absent, text_encoder_2={"vocab_size": None}))
    assert (spec.variant, spec.text_encoder_2["vocab_size"]) == ("FLUX.1-schnell", 32128)


@pytest.mark.parametrize(
    ("part", "fields", "error", "message"),
    [
        ("transformer", {"in_channels": 384}, UnsupportedModel, "not a text-to-image checkpoint"),
        ("transformer", {"guidance_embeds": "yes"}, ModelError, "guidance_embeds must be true or false"),
        ("transformer", {"num_layers": 0}, ModelError, "num_layers must be a positive integer"),
        ("transformer", {"joint_attention_dim": 2048}, ModelError, "text_encoder_2 is 4096 wide"),
        ("text_encoder", {"hidden_size": 512}, ModelError, "text_encoder is 512 wide"),
        ("vae", {"block_out_channels": []}, ModelError, "a list of some positive integers"),
        ("vae", {"block_out_channels": None}, ModelError, "a list of some positive integers"),
        ("vae", {"block_out_channels": [128, "256"]}, ModelError, "a list of some positive integers"),
    ],
)
def test_other_models_are_refused_by_name(
    tmp_path: Path, part: str, fields: dict[str, Any], error: type[ModelError], message: str
) -> None:
    with pytest.raises(error, match=message):
        identify(write(tmp_path, **{part: fields}), "safelight")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("height", 1000, "992 and 1008"),
        ("width", 8, "from 16"),
        ("width", 8208, "to 8192"),
        ("width", 80, None),
        ("num_frames", 5, "makes pictures"),
        ("guidance_scale", 7.0, None),
        ("guidance_scale", 100.5, "from 0"),
        ("true_cfg_scale", 101.0, "true_cfg_scale must be from 0"),
        ("true_cfg_scale", 4.0, None),
        ("negative_prompt", "blur", "true_cfg_scale above 1"),
        ("sampler", "unipc", "euler"),
        ("num_inference_steps", 0, "from 1"),
        ("seed", -1, "from 0"),
    ],
)
def test_wrong_parameters_are_named_with_the_nearest_right_ones(
    dev: ModelSpec, field: str, value: Any, message: str | None
) -> None:
    params = dataclasses.replace(dev.defaults, **{field: value})
    if message is None:
        validate(dev, params)
        return
    with pytest.raises(InvalidRequest, match=message) as caught:
        validate(dev, params)
    assert caught.value.param == field


def test_schnell_takes_no_guidance_but_true_guidance(schnell: ModelSpec) -> None:
    validate(schnell, schnell.defaults)
    validate(schnell, dataclasses.replace(schnell.defaults, true_cfg_scale=2.0, negative_prompt="blur"))
    with pytest.raises(InvalidRequest, match="without guidance_scale"):
        validate(schnell, dataclasses.replace(schnell.defaults, guidance_scale=3.5))


def test_costs_are_those_of_the_published_model(dev: ModelSpec, schnell: ModelSpec) -> None:
    profile = FAMILIES["flux"].profile(dev, dev.defaults)
    assert (profile.latent_shape, profile.tokens, profile.chunk_frames) == ((16, 1, 128, 128), 4096, (1,))
    assert profile.phases[0].step_cost == pytest.approx(74.4, rel=0.01)  # 12B parameters x 4,608 tokens, and attention
    assert not profile.phases[0].batch_key.guided
    params = dataclasses.replace(dev.defaults, true_cfg_scale=2.0)
    guided = FAMILIES["flux"].profile(dev, params)
    assert guided.phases[0].step_cost == 2 * profile.phases[0].step_cost
    assert guided.phases[0].batch_key.guided
    short = FAMILIES["flux"].profile(schnell, schnell.defaults)
    assert (short.phases[0].batch_key.text_bucket, profile.phases[0].batch_key.text_bucket) == (256, 512)
    assert short.phases[0].step_cost < profile.phases[0].step_cost


def test_the_plan_counts_text_as_part_of_the_sequence(dev: ModelSpec, capsys: pytest.CaptureFixture[str]) -> None:
    shape = FAMILIES["flux"].attention_of(dev)
    assert (shape.heads, shape.head_dim, shape.layers, shape.joint_text) == (24, 128, 57, 512)
    assert not FAMILIES["flux"].guided_by_default(dev)
    show("FLUX.1-dev", 8, True)
    plan = json.loads(capsys.readouterr().out)
    assert plan["degrees"] == {"cfg": 1, "ring": 1, "ulysses": 8}
    assert plan["encoder"] == {"tp": 1, "sets": 1}
