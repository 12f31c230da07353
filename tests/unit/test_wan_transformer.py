"""Our Wan transformer against diffusers' with the same random weights, float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safelight.runtime.errors import ModelError
from safelight.runtime.layers.linear import Adapter
from safelight.runtime.layers.rope import Rotary
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.wan.transformer import WanConfig, WanText, WanTransformer
from safelight.runtime.models.wan.weights import load_transformer, name_map
from safelight.runtime.parallel.mesh import ParallelMesh

TOLERANCE = 1e-4  # the design's bound on max abs error; the tests below hold a tenth of it
TEXT_LENGTH, REAL_TEXT = 24, 7


def reference_class() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    model = reference_class()(
        num_attention_heads=4, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    path = tmp_path_factory.mktemp("wan")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return reference_class().from_pretrained(folder).eval()


def options(dtype: torch.dtype = torch.float32) -> LoadOptions:
    return LoadOptions(torch.device("cpu"), dtype, torch.float32, None, ParallelMesh.single())


@pytest.fixture(scope="module")
def ours(folder: Path) -> WanTransformer:
    return load_transformer(folder, options())


def inputs(batch: int, size: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, a different timestep per sample, and text of which all but REAL_TEXT tokens are zero padding."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, TEXT_LENGTH, 32, generator=generator)
    text[:, REAL_TEXT:] = 0
    timestep = torch.tensor([999.0, 431.5, 2.0])[:batch]
    return torch.randn(batch, 16, *size, generator=generator), timestep, text


@torch.inference_mode()
def predict(model: Any, latents: Tensor, timestep: Tensor, text: Tensor, **extra: Any) -> Tensor:
    if isinstance(model, WanTransformer):
        prediction: Tensor = model(latents, timestep, WanText(text), **extra)
    else:
        prediction = model(latents, timestep, text, return_dict=False)[0]
    return prediction


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 2, 2), (1, 16, 16), (2, 6, 10), (3, 10, 6), (5, 8, 14), (21, 4, 2)])
def test_prediction_equals_the_reference(
    ours: WanTransformer, reference: Any, batch: int, size: tuple[int, int, int]
) -> None:
    sample = inputs(batch, size)
    expected = predict(reference, *sample)
    assert expected.std() > 0.2
    assert error(predict(ours, *sample), expected) <= TOLERANCE / 10


def test_a_timestep_per_token_equals_the_reference(ours: WanTransformer, reference: Any) -> None:
    latents, _, text = inputs(2, (3, 6, 4))
    timestep = torch.rand(2, 3 * 3 * 2, generator=torch.Generator().manual_seed(1)) * 1000
    expected = predict(reference, latents, timestep, text)
    assert error(predict(ours, latents, timestep, text), expected) <= TOLERANCE / 10


def test_a_batch_of_two_equals_two_runs_of_one(ours: WanTransformer) -> None:
    latents, timestep, text = inputs(2, (3, 6, 10))
    both = predict(ours, latents, timestep, text)
    for i in range(2):
        alone = predict(ours, latents[i : i + 1], timestep[i : i + 1], text[i : i + 1])
        assert error(both[i : i + 1], alone) <= TOLERANCE / 10


def test_half_precision_is_at_most_twice_as_far_from_float32_as_the_reference(folder: Path, reference: Any) -> None:
    ours = load_transformer(folder, options(torch.bfloat16))
    theirs = reference_class().from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    latents, _, text = inputs(1, (3, 8, 8))
    for timestep in (1.0, 250.0, 500.0, 750.0, 999.0):
        t = torch.tensor([timestep])
        exact = predict(reference, latents, t, text)
        low = latents.bfloat16(), t, text.bfloat16()
        distance = (predict(ours, *low).float() - exact).norm()
        assert distance <= 2 * (predict(theirs, *low).float() - exact).norm()


def test_dropped_rotary_positions_show(ours: WanTransformer, reference: Any) -> None:
    sample = inputs(1, (3, 6, 10))
    cos, sin = ours.rope(sample[0].shape)
    dropped = Rotary(torch.ones_like(cos), torch.zeros_like(sin))
    assert error(predict(ours, *sample, rotary=dropped), predict(reference, *sample)) > 50 * TOLERANCE


def test_foreign_text_shows(ours: WanTransformer, reference: Any) -> None:
    latents, timestep, text = inputs(1, (3, 6, 10))
    foreign = inputs(1, (3, 6, 10), seed=1)[2]
    expected = predict(reference, latents, timestep, text)
    assert error(predict(ours, latents, timestep, foreign), expected) > 50 * TOLERANCE


def test_text_without_its_zero_padding_shows(ours: WanTransformer, reference: Any) -> None:
    latents, timestep, text = inputs(1, (3, 6, 10))
    cut = predict(ours, latents, timestep, text[:, :REAL_TEXT])
    assert error(cut, predict(reference, latents, timestep, text)) > 50 * TOLERANCE


@pytest.mark.parametrize("pair", [("blocks.0", "blocks.2"), ("blocks.1.self_attention.norm_q", "blocks.1.self_attention.norm_k")])  # fmt: skip  # noqa: E501
def test_swapped_weights_show(folder: Path, reference: Any, pair: tuple[str, str]) -> None:
    model = load_transformer(folder, options())
    first, second = (model.get_submodule(name) for name in pair)
    a, b = first.state_dict(), {name: tensor.clone() for name, tensor in second.state_dict().items()}
    second.load_state_dict(a)
    first.load_state_dict(b)
    sample = inputs(1, (3, 6, 10))
    assert error(predict(model, *sample), predict(reference, *sample)) > 50 * TOLERANCE


def test_a_kept_rotary_table_and_an_out_buffer_change_nothing(ours: WanTransformer) -> None:
    sample = inputs(2, (3, 6, 10))
    buffer = torch.full_like(sample[0], float("nan"))
    result = predict(ours, *sample, rotary=ours.rope(sample[0].shape), out=buffer)
    assert result.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, predict(ours, *sample))


def test_adapters_of_a_call_act_like_merged_weights_and_leave_the_weights_alone(folder: Path) -> None:
    model, merged = load_transformer(folder, options()), load_transformer(folder, options())
    generator = torch.Generator().manual_seed(3)
    adapters = {}
    for name in ("blocks.1.self_attention.qkv", "blocks.2.feed_forward.down", "projection", "text_embedding.up"):
        weight = merged.get_parameter(f"{name}.weight")
        down = torch.randn(2, weight.shape[1], generator=generator) * 0.2
        up = torch.randn(weight.shape[0], 2, generator=generator) * 0.2
        adapters[name] = (Adapter(down, up, 0.5),)
        weight.data += 0.5 * up @ down
    sample = inputs(2, (1, 6, 10))
    plain = predict(model, *sample)
    adapted = predict(model, *sample, adapters=adapters)
    assert error(adapted, predict(merged, *sample)) <= TOLERANCE / 10
    assert error(adapted, plain) > 50 * TOLERANCE
    assert torch.equal(predict(model, *sample), plain)


def test_compiled_forward_has_no_branch_on_values(ours: WanTransformer) -> None:
    sample = inputs(1, (2, 4, 6))
    explained = torch._dynamo.explain(ours)(sample[0], sample[1], WanText(sample[2]))
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0


def test_the_name_map_covers_every_parameter_once(ours: WanTransformer) -> None:
    names = name_map(ours.config)
    sources = [source for parts in names.values() for source in parts]
    assert set(names) == {name for name, _ in ours.named_parameters()}
    assert len(sources) == len(set(sources))


def test_latents_that_do_not_divide_by_the_patch_are_refused(ours: WanTransformer) -> None:
    with pytest.raises(ValueError, match="do not divide by the patch"):
        predict(ours, *inputs(1, (1, 3, 4)))


def test_a_grid_beyond_the_rotary_tables_is_refused(ours: WanTransformer) -> None:
    with pytest.raises(ValueError, match="1024 positions"):
        ours.rope((1, 2, 2050))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_dim": 1280}, "image embeddings"),
        ({"qk_norm": "layer_norm"}, "rms_norm_across_heads expected, got 'layer_norm'"),
        ({"ffn_dim": None}, "incomplete.*ffn_dim"),
    ],
)
def test_configs_of_other_networks_are_refused(change: dict[str, Any], message: str) -> None:
    values = {
        "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": 32,
        "freq_dim": 32, "ffn_dim": 64, "num_layers": 1,
    } | change  # fmt: skip
    with pytest.raises(ModelError, match=message):
        WanConfig.from_json({name: value for name, value in values.items() if value is not None})
