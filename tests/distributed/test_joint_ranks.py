"""Joint attention over text and image tokens on 2, 3 and 4 gloo processes against one process, and diffusers' layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import module, run_ranks
from safetensors.torch import load_file
from torch import Tensor

from safelight.kernels.dispatch import reference_kernels
from safelight.runtime.layers.attention import JointAttention
from safelight.runtime.layers.rope import Rotary
from safelight.runtime.parallel.joint import JointShare
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.parallel.sequence import SequenceGroups
from safelight.runtime.parallel.ulysses import split_sizes

TOLERANCE = 1e-5
RANKS = Path(__file__).with_name("joint_ranks.py")
PROGRAM = module(RANKS)
LAYOUTS = [layout for world in (2, 3, 4) for layout in PROGRAM.layouts(world)]
Ranks = dict[int, list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def one_rank() -> dict[str, tuple[Tensor, Tensor]]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        return {c.name: PROGRAM.attend(c, ParallelMesh.single(), reference_kernels()) for c in PROGRAM.CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    results = {}
    for world in (2, 3, 4):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        run_ranks(RANKS, world, folder, folder)
        results[world] = [load_file(folder / f"{rank}.safetensors") for rank in range(world)]
    return results


@pytest.mark.parametrize("case", [case.name for case in PROGRAM.CASES])
@pytest.mark.parametrize(("ring", "ulysses"), LAYOUTS)
def test_every_rank_has_the_text_and_image_of_one_rank(
    one_rank: dict[str, tuple[Tensor, Tensor]], ranks: Ranks, ring: int, ulysses: int, case: str
) -> None:
    for kind, alone in zip(("text", "image"), one_rank[case], strict=True):
        for result in ranks[ring * ulysses]:
            made = result[f"{ring}x{ulysses} {case} {kind}"]
            assert made.shape == alone.shape
            assert torch.allclose(made, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("control", ["wrong_weights", "wrong_padding"])
@pytest.mark.parametrize(("ring", "ulysses"), LAYOUTS)
def test_wrong_weights_and_wrong_padding_show(
    one_rank: dict[str, tuple[Tensor, Tensor]], ranks: Ranks, ring: int, ulysses: int, control: str
) -> None:
    alone = one_rank[PROGRAM.CASES[-1].name][1]
    made = ranks[ring * ulysses][0][f"{ring}x{ulysses} {control} image"]
    assert (made - alone).abs().max() > 50 * TOLERANCE


@given(st.integers(0, 40), st.integers(0, 90), st.integers(1, 8))
def test_shares_cover_text_and_image_once(text: int, image: int, parts: int) -> None:
    sizes = split_sizes(text + image, parts)
    alone = SequenceGroups(None, None)
    shares = [JointShare(alone, text, image, sum(sizes[:r]), size) for r, size in enumerate(sizes)]
    texts, images = torch.arange(text)[None], torch.arange(image)[None] + 1000
    cut = [share.shard(texts, images) for share in shares]
    assert torch.equal(torch.cat([a for a, _ in cut], dim=1), texts)
    assert torch.equal(torch.cat([b for _, b in cut], dim=1), images)
    assert [a.shape[1] + b.shape[1] for a, b in cut] == sizes
    for share, (a, b) in zip(shares, cut, strict=True):
        halves = share.split(torch.cat([a, b], dim=1))
        assert torch.equal(halves[0], a)
        assert torch.equal(halves[1], b)


@torch.inference_mode()
def test_one_rank_computes_what_diffusers_computes() -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttention

    heads, dim, text, image = 3, 8, 5, 9
    width = heads * dim
    torch.manual_seed(0)
    theirs: Any = FluxAttention(
        query_dim=width, added_kv_proj_dim=width, dim_head=dim, heads=heads, bias=True, eps=1e-6
    )
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    groups = SequenceGroups(None, None)
    ours = JointAttention(width, heads, 1e-6, reference_kernels(), groups=groups)
    linears = {
        "qkv": ("to_q", "to_k", "to_v"), "text_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"), "out": ("to_out.0",),
        "text_out": ("to_add_out",), "norm_q": ("norm_q",), "norm_k": ("norm_k",), "norm_text_q": ("norm_added_q",),
        "norm_text_k": ("norm_added_k",),
    }  # fmt: skip
    state = theirs.state_dict()
    ours.load_state_dict(
        {
            f"{name}.{leaf}": torch.cat([state[f"{part}.{leaf}"] for part in parts])
            for name, parts in linears.items()
            for leaf in ("weight", "bias")
            if f"{parts[0]}.{leaf}" in state
        }
    )
    angles = torch.outer(torch.arange(text + image) * 0.7, torch.linspace(1.0, 0.1, dim // 2))
    whole = [t.repeat_interleave(2, dim=1) for t in (angles.cos(), angles.sin())]
    texts, images = torch.randn(2, text, width), torch.randn(2, image, width)
    share = JointShare.of(groups, text, image)
    made = ours(texts, images, Rotary(angles.cos(), angles.sin()), share)
    expected = theirs(images, texts, image_rotary_emb=(whole[0], whole[1]))
    torch.testing.assert_close(made[1], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(made[0], expected[1], atol=1e-5, rtol=0)
