"""How many ranks share a text encoder: chosen so that it is never slower, as asked, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from safelight.configs.encoder_parallel import (
    EncoderShape,
    EncoderShares,
    choose_encoder_shares,
    encode_seconds,
    explain_encoder,
)
from safelight.configs.families import FAMILIES
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.plan import find_model
from safelight.runtime.errors import ConfigError

UMT5_XXL = EncoderShape(layers=24, heads=64, width=4096, inner=4096, d_ff=10240, vocabulary=256384)
TINY = EncoderShape(layers=2, heads=4, width=32, inner=32, d_ff=64, vocabulary=100)
SHAPES = st.builds(
    EncoderShape, st.integers(1, 40), st.integers(1, 64), st.integers(8, 4096), st.integers(8, 4096),
    st.integers(8, 10240), st.integers(10, 300_000),
)  # fmt: skip


@given(SHAPES, st.integers(1, 64), st.sampled_from(["cpu", "cuda"]))
def test_what_is_chosen_is_never_slower_than_one_rank(shape: EncoderShape, world: int, device: str) -> None:
    chosen = choose_encoder_shares(None, shape, world, device)
    alone = encode_seconds(shape, EncoderShares(), device)
    assert encode_seconds(shape, chosen, device) <= alone
    assert world % chosen.tp == 0
    assert chosen.tp <= shape.heads
    assert chosen.sets in (1, world // chosen.tp)


def test_a_large_encoder_is_split_where_arithmetic_is_its_time_and_a_tiny_one_nowhere() -> None:
    assert choose_encoder_shares(None, UMT5_XXL, 2, "cpu") == EncoderShares(2, 1)
    assert choose_encoder_shares(None, UMT5_XXL, 64, "cpu").tp == 8  # the ranks of one encoder are on one host
    assert choose_encoder_shares(None, UMT5_XXL, 8, "cuda") == EncoderShares()  # launching it is the time
    assert choose_encoder_shares(None, TINY, 8, "cuda") == EncoderShares()
    assert choose_encoder_shares(None, TINY, 2, "cpu") == EncoderShares()


@pytest.mark.parametrize(("tokens", "shares"), [(128, (1, 1)), (2000, (1, 2)), (4000, (2, 1))])
def test_gpus_share_prompts_whose_arithmetic_is_longer_than_launching_it(tokens: int, shares: tuple[int, int]) -> None:
    assert choose_encoder_shares(None, replace(UMT5_XXL, tokens=tokens), 2, "cuda") == EncoderShares(*shares)


@pytest.mark.parametrize(
    ("width", "keys", "d_ff", "layers", "measured_ms"),
    [(4096, 4096, 10240, 24, (24.6, 35.1, 47.7)), (3584, 512, 18944, 28, (23.7, 39.3, 75.2))],
)
def test_two_gpus_take_what_was_measured(
    width: int, keys: int, d_ff: int, layers: int, measured_ms: tuple[float, float, float]
) -> None:
    """docs/parallelism.md: UMT5-XXL and Qwen2.5-VL, whole on every rank (two figures) and split, which vary by
    half."""
    shape = EncoderShape(layers, 4, width, width, d_ff, 1000, keys=keys)
    least, most, split = measured_ms
    assert least < 1e3 * encode_seconds(shape, EncoderShares(), "cuda") < most
    assert 1e3 * encode_seconds(shape, EncoderShares(2), "cuda") == pytest.approx(split, rel=0.25)


def test_what_is_asked_for_is_taken() -> None:
    assert choose_encoder_shares(4, UMT5_XXL, 8, "cuda") == EncoderShares(4, 2)  # two sets, one prompt each
    assert choose_encoder_shares(2, TINY, 2, "cpu") == EncoderShares(2, 1)
    assert choose_encoder_shares(1, UMT5_XXL, 2, "cpu") == EncoderShares(1, 2)


@pytest.mark.parametrize(
    ("wanted", "shape", "reason"),
    [
        (8, TINY, r"has 4 heads, and.*use at most 4"),
        (8, replace(TINY, keys=8, heads=2), r"has 2 heads of keys and values, and.*use at most 2"),
        (2, None, "runs whole on every rank; leave it out"),
    ],
)
def test_what_the_model_cannot_do_is_refused(wanted: int, shape: EncoderShape | None, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        choose_encoder_shares(wanted, shape, 8, "cuda")
    assert caught.value.param == "tp_size"
    assert choose_encoder_shares(None, None, 8, "cuda") == EncoderShares()
    assert choose_encoder_shares(1, None, 8, "cuda") == EncoderShares()


@pytest.mark.parametrize("flags", [{"num_gpus": 4, "tp_size": 3}, {"num_gpus": 8, "replicas": 4, "tp_size": 4}])
def test_a_size_that_does_not_divide_a_replica_is_refused_at_once(flags: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"--tp-size \d does not divide the \d workers of a replica"):
        ServerArgs(**flags)  # type: ignore[arg-type]


def test_the_reasons_say_what_each_rank_holds() -> None:
    split = choose_encoder_shares(None, UMT5_XXL, 8, "cpu")
    assert "1.42 GB of text encoder a rank" in explain_encoder(split, None, UMT5_XXL, 8, "cpu")
    whole = choose_encoder_shares(None, TINY, 8, "cuda")
    assert "longer than they save" in explain_encoder(whole, None, TINY, 8, "cuda")
    assert "as asked" in explain_encoder(EncoderShares(2), 2, TINY, 8, "cuda")
    assert "one rank;" in explain_encoder(EncoderShares(), None, TINY, 1, "cuda")


@pytest.mark.parametrize("model", ["builtin", "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"])
def test_every_variants_config_gives_its_encoders_numbers(model: str) -> None:
    spec = find_model(model)
    shape = FAMILIES[spec.family].encoder_of(spec)
    assert shape is not None
    config = spec.root / "text_encoder" / "config.json"
    if config.is_file():
        assert shape.vocabulary == json.loads(Path(config).read_text())["vocab_size"]
    else:
        assert shape == UMT5_XXL


@pytest.mark.parametrize(
    ("model", "kind", "layers", "prompts"),
    [
        ("Qwen-Image", (Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel), 28, 2),
        ("Qwen-Image-Edit-2511", (Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel), 28, 2),
        ("Z-Image", (Qwen3Config, Qwen3Model), 35, 2),
        ("Z-Image-Turbo", (Qwen3Config, Qwen3Model), 35, 1),
    ],
)
def test_a_language_models_numbers_are_those_of_its_matrices(model: str, kind: Any, layers: int, prompts: int) -> None:
    spec = find_model(model)
    shape = FAMILIES[spec.family].encoder_of(spec)
    assert shape is not None
    config, build = kind
    with torch.device("meta"):
        module = build(config(**{k: v for k, v in spec.text_encoder.items() if k != "vision_config"}))
    matrices = [p.numel() for layer in module.layers[:layers] for p in layer.parameters() if p.ndim == 2]
    assert (shape.layers, shape.prompts, shape.layer_weights) == (layers, prompts, sum(matrices))
    assert module.embed_tokens.weight.shape == (shape.vocabulary, shape.width)
    assert shape.heads == module.config.num_key_value_heads
    assert shape.tokens > 90
