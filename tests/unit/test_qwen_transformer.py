"""Our Qwen-Image transformer against diffusers' with the same random weights, float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safelight.runtime.errors import ModelError
from safelight.runtime.layers.linear import Adapter
from safelight.runtime.layers.rope import Rotary
from safelight.runtime.models.qwen.transformer import QwenConfig, QwenInputs, QwenTransformer
from safelight.runtime.models.qwen.weights import load_transformer, name_map
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.parallel.mesh import ParallelMesh

TOLERANCE = 1e-4  # the design's bound on max abs error; the tests below hold a tenth of it
CHANNELS, TEXT_DIM = 4, 32
Size = tuple[int, int]  # latent rows and columns
CASES: tuple[tuple[int, tuple[Size, ...]], ...] = (  # text tokens, and the latents of every picture
    (1, ((2, 2),)),
    (7, ((10, 6),)),
    (33, ((6, 14),)),
    (5, ((6, 10), (8, 4))),
    (13, ((10, 6), (6, 6), (4, 14), (2, 2))),
)


def reference_class() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel


def made(folder: Path, zero_cond_t: bool) -> Path:
    torch.manual_seed(7)
    model = reference_class()(
        in_channels=16, out_channels=CHANNELS, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6), zero_cond_t=zero_cond_t,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    torch.set_num_threads(1)
    return {zero: made(tmp_path_factory.mktemp("qwen"), zero) for zero in (False, True)}


@pytest.fixture(scope="module")
def references(folders: dict[bool, Path]) -> dict[bool, Any]:
    return {zero: reference_class().from_pretrained(folder).eval() for zero, folder in folders.items()}


def options(dtype: torch.dtype = torch.float32) -> LoadOptions:
    return LoadOptions(torch.device("cpu"), dtype, torch.float32, None, ParallelMesh.single())


@pytest.fixture(scope="module")
def ours(folders: dict[bool, Path]) -> dict[bool, QwenTransformer]:
    return {zero: load_transformer(folder, options()) for zero, folder in folders.items()}


Sample = tuple[list[Tensor], Tensor, Tensor]


def inputs(text: int, sizes: tuple[Size, ...], batch: int = 1, seed: int = 0) -> Sample:
    """The latents of every picture, a different timestep per sample, and text."""
    generator = torch.Generator().manual_seed(seed)
    pictures = [torch.randn(batch, CHANNELS, 1, *size, generator=generator) for size in sizes]
    timestep = torch.tensor([999.0, 431.5, 2.0])[:batch]
    return pictures, timestep, torch.randn(batch, text, TEXT_DIM, generator=generator)


@torch.inference_mode()
def predict(model: QwenTransformer, sample: Sample, **extra: Any) -> Tensor:
    pictures, timestep, text = sample
    prediction: Tensor = model(pictures[0], timestep, QwenInputs(text, tuple(pictures[1:])), **extra)
    return prediction


def packed(latents: Tensor) -> Tensor:
    from diffusers import QwenImagePipeline

    batch, channels, _, h, w = latents.shape
    tokens: Tensor = QwenImagePipeline._pack_latents(latents, batch, channels, h, w)
    return tokens


@torch.inference_mode()
def expected(model: Any, sample: Sample) -> Tensor:
    from diffusers import QwenImagePipeline

    pictures, timestep, text = sample
    h, w = pictures[0].shape[-2:]
    tokens = model(
        torch.cat([packed(p) for p in pictures], dim=1),
        encoder_hidden_states=text,
        timestep=timestep / 1000,
        img_shapes=[[(1, p.shape[-2] // 2, p.shape[-1] // 2) for p in pictures]] * len(text),
        return_dict=False,
    )[0]
    latents: Tensor = QwenImagePipeline._unpack_latents(tokens[:, : h * w // 4], 8 * h, 8 * w, 8)
    return latents


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("zero", [False, True], ids=["one_time", "zero_cond_t"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("text", "sizes"), CASES)
def test_prediction_equals_the_reference(
    ours: Any, references: Any, text: int, sizes: tuple[Size, ...], batch: int, zero: bool
) -> None:
    sample = inputs(text, sizes, batch)
    wanted = expected(references[zero], sample)
    assert wanted.std() > 0.2
    assert error(predict(ours[zero], sample), wanted) <= TOLERANCE / 10


def test_a_batch_of_two_equals_two_runs_of_one(ours: Any) -> None:
    pictures, timestep, text = inputs(9, ((6, 10), (4, 6)), 2)
    both = predict(ours[False], (pictures, timestep, text))
    for i in range(2):
        one = slice(i, i + 1)
        alone = predict(ours[False], ([p[one] for p in pictures], timestep[one], text[one]))
        assert error(both[one], alone) <= TOLERANCE / 10


@pytest.mark.parametrize("zero", [False, True])
def test_half_precision_is_at_most_twice_as_far_from_float32_as_the_reference(
    folders: dict[bool, Path], references: Any, zero: bool
) -> None:
    low = load_transformer(folders[zero], options(torch.bfloat16))
    theirs = reference_class().from_pretrained(folders[zero], torch_dtype=torch.bfloat16).eval()
    pictures, _, text = inputs(11, ((8, 8), (6, 4)))
    for timestep in (1.0, 250.0, 500.0, 750.0, 999.0):
        sample = pictures, torch.tensor([timestep]), text
        exact = expected(references[zero], sample)
        halved = [p.bfloat16() for p in pictures], sample[1].bfloat16(), text.bfloat16()
        distance = (predict(low, sample).float() - exact).norm()
        assert distance <= 2 * (expected(theirs, halved).float() - exact).norm()


# ---------------------------------------------------------------------------------------------------------------------
# What must show

SAMPLE = (7, ((6, 10), (8, 4)))


def test_dropped_rotary_positions_show(ours: Any, references: Any) -> None:
    sample = inputs(*SAMPLE)
    cos, sin = ours[False].rope(((3, 5), (4, 2)), 7)
    dropped = Rotary(torch.ones_like(cos), torch.zeros_like(sin))
    assert error(predict(ours[False], sample, rotary=dropped), expected(references[False], sample)) > 50 * TOLERANCE


@pytest.mark.parametrize(("grids", "text"), [(((3, 5), (2, 4)), 7), (((4, 2), (3, 5)), 7)])
def test_positions_of_another_grid_show(
    ours: Any, references: Any, grids: tuple[tuple[int, int], ...], text: int
) -> None:
    sample = inputs(*SAMPLE)
    other = ours[False].rope(grids, text)
    assert error(predict(ours[False], sample, rotary=other), expected(references[False], sample)) > 50 * TOLERANCE


def test_positions_that_begin_at_zero_and_not_at_the_centre_show(ours: Any, references: Any) -> None:
    """Attention between pictures sees only differences of positions; text and pictures of other sizes tell."""
    sample = inputs(*SAMPLE)
    rope, wrong = ours[False].rotary, []
    for table in (rope.cos, rope.sin):
        pictures = torch.cat([rope._picture(table.roll(-40, 0), n, g) for n, g in enumerate(((3, 5), (4, 2)))])
        wrong.append(torch.cat([table[rope.reach + 2 : rope.reach + 9], pictures]))
    assert (
        error(predict(ours[False], sample, rotary=Rotary(*wrong)), expected(references[False], sample)) > 50 * TOLERANCE
    )


def test_swapped_or_missing_pictures_show(ours: Any, references: Any) -> None:
    pictures, timestep, text = sample = inputs(5, ((6, 10), (4, 6), (4, 6)))
    wanted = expected(references[False], sample)
    for wrong in ([pictures[0], pictures[2], pictures[1]], pictures[:2]):
        assert error(predict(ours[False], (wrong, timestep, text)), wanted) > 50 * TOLERANCE


def test_padded_text_shows(ours: Any, references: Any) -> None:
    pictures, timestep, text = sample = inputs(*SAMPLE)
    padded = torch.nn.functional.pad(text, (0, 0, 0, 1))
    assert (
        error(predict(ours[False], (pictures, timestep, padded)), expected(references[False], sample)) > 50 * TOLERANCE
    )


def test_pictures_modulated_by_the_step_show_where_they_are_modulated_by_zero(ours: Any, references: Any) -> None:
    sample = inputs(*SAMPLE)
    assert error(predict(ours[False], sample), expected(references[False], sample)) <= TOLERANCE / 10
    whole = ours[True]
    merged = QwenTransformer(
        QwenConfig(3, 16, 2, TEXT_DIM, 16, CHANNELS, 2, (4, 6, 6)), ParallelMesh.single(), whole.kernels
    )
    merged.load_state_dict(whole.state_dict())
    assert error(predict(merged, sample), expected(references[True], sample)) > 50 * TOLERANCE


@pytest.mark.parametrize("pair", [("blocks.0", "blocks.1"), ("blocks.1.feed_forward", "blocks.1.text_feed_forward"), ("modulation.layers.0", "modulation.layers.1"), ("blocks.1.attention.norm_q", "blocks.1.attention.norm_text_q")])  # fmt: skip  # noqa: E501
def test_swapped_weights_show(folders: dict[bool, Path], references: Any, pair: tuple[str, str]) -> None:
    model = load_transformer(folders[False], options())
    first, second = (model.get_submodule(name) for name in pair)
    a, b = first.state_dict(), {name: tensor.clone() for name, tensor in second.state_dict().items()}
    second.load_state_dict(a)
    first.load_state_dict(b)
    sample = inputs(*SAMPLE)
    assert error(predict(model, sample), expected(references[False], sample)) > 50 * TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# What callers rely on


def test_a_kept_rotary_table_and_an_out_buffer_change_nothing(ours: Any) -> None:
    sample = inputs(*SAMPLE)
    plain, out = predict(ours[True], sample), torch.empty(1, CHANNELS, 1, 6, 10)
    kept = predict(ours[True], sample, rotary=ours[True].rope(((3, 5), (4, 2)), 7), out=out)
    assert kept is out
    assert torch.equal(kept, plain)


def test_an_adapter_changes_what_it_is_named_for(ours: Any) -> None:
    sample, width = inputs(*SAMPLE), 48
    down, up = torch.randn(2, width), torch.randn(width, 2)
    for name in ("blocks.1.attention.out", "blocks.0.attention.text_out"):
        adapted = predict(ours[False], sample, adapters={name: (Adapter(down, up, 0.5),)})
        model = ours[False].get_submodule(name)
        kept = model.weight.data
        model.weight.data = kept + 0.5 * up @ down
        merged = predict(ours[False], sample)
        model.weight.data = kept
        assert error(adapted, merged) <= TOLERANCE / 10
        assert error(adapted, predict(ours[False], sample)) > 50 * TOLERANCE


def test_every_published_tensor_has_its_place(references: Any) -> None:
    names = name_map(QwenConfig(3, 16, 2, TEXT_DIM, 16, CHANNELS, 2, (4, 6, 6)))
    used = [source for sources in names.values() for source in sources]
    assert sorted(used) == sorted(references[False].state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_embeds": True}, "guidance_embeds"),
        ({"use_additional_t_cond": True}, "use_additional_t_cond"),
        ({"in_channels": 12}, "in_channels"),
        ({"axes_dims_rope": [4, 4, 4]}, "axes_dims_rope"),
    ],
)
def test_relatives_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        QwenConfig.from_json({"attention_head_dim": 16, "axes_dims_rope": [4, 6, 6], **change})


def test_latents_that_do_not_divide_and_too_much_text_are_errors(ours: Any) -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        predict(ours[False], inputs(3, ((5, 4),)))
    with pytest.raises(ValueError, match="exceed 4096 positions"):
        ours[False].rope(((2, 2),), 4096)


def test_compiled_blocks_have_no_branch_on_values_and_share_a_graph_over_texts(
    ours: Any, folders: dict[bool, Path]
) -> None:
    """As `compile_blocks` does it, with a backend that only counts: one graph for the first length, one for others."""
    from torch._dynamo.testing import CompileCounter

    counter: Any = CompileCounter()
    compiled = load_transformer(folders[False], options())
    compiled.blocks[0].compile(fullgraph=True, backend=counter)
    frames = []
    for length in (7, 20, 33, 64, 5):
        sample = inputs(length, ((10, 6),))
        assert torch.equal(predict(compiled, sample), predict(ours[False], sample))
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2, 2]
