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


def test_a_large_encoder_is_split_and_a_tiny_one_is_not() -> None:
    assert choose_encoder_shares(None, UMT5_XXL, 8, "cuda") == EncoderShares(8, 1)
    assert choose_encoder_shares(None, UMT5_XXL, 2, "cpu") == EncoderShares(2, 1)
    assert choose_encoder_shares(None, TINY, 8, "cuda") == EncoderShares()
    assert choose_encoder_shares(None, TINY, 2, "cpu") == EncoderShares()


def test_the_ranks_of_one_encoder_are_on_one_host() -> None:
    assert choose_encoder_shares(None, UMT5_XXL, 64, "cuda").tp == 8


def test_what_is_asked_for_is_taken() -> None:
    assert choose_encoder_shares(4, UMT5_XXL, 8, "cuda") == EncoderShares(4, 2)  # two sets, one prompt each
    assert choose_encoder_shares(2, TINY, 2, "cpu") == EncoderShares(2, 1)
    assert choose_encoder_shares(1, UMT5_XXL, 2, "cuda") == EncoderShares(1, 2)


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
    split = choose_encoder_shares(None, UMT5_XXL, 8, "cuda")
    assert "1.42 GB of text encoder a rank" in explain_encoder(split, None, UMT5_XXL, 8, "cuda")
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
