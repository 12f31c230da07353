"""On one CUDA device: the exchange kernels with several windows on it, one for each rank that is played in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from safelight.runtime.parallel.ulysses import offsets, split_sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [  # batch, length, heads, dim, ranks
    (1, 4608, 24, 128, 2),
    (2, 37, 12, 128, 8),
    (3, 11, 5, 64, 3),
    (1, 7, 3, 40, 3),
    (2, 9, 4, 6, 4),
]


def windows(ranks: int, elements: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    made = [torch.full((elements,), torch.nan, dtype=dtype, device="cuda") for _ in range(ranks)]
    return made, torch.tensor([window.data_ptr() for window in made], device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_arrive_where_each_rank_reads_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from safelight.kernels.triton.exchange import push_heads

    batch, length, heads, dim, ranks = shape
    q, k = torch.randn(2, batch, length, heads, dim, device="cuda", dtype=dtype)
    v = torch.randn(batch, length, 3, heads, dim, device="cuda", dtype=dtype)[:, :, 2]  # a slice of a fused projection
    made, places = windows(ranks, 3 * batch * length * heads * dim, dtype)
    tokens, own = split_sizes(length, ranks), split_sizes(heads, ranks)
    for rank in range(ranks):
        cut = [torch.split(t, tokens, dim=1)[rank] for t in (q, k, v)]
        push_heads(cut[0], cut[1], cut[2], places, length, offsets(tokens)[rank])
    for rank, window in enumerate(made):
        size = 3 * batch * length * own[rank] * dim
        came = window[:size].view(3, batch, length, own[rank], dim)
        expected = torch.stack([torch.split(t, own, dim=2)[rank] for t in (q, k, v)])
        assert torch.equal(came, expected)
        assert window[size:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_arrive_where_each_rank_reads_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from safelight.kernels.triton.exchange import push_tokens

    batch, length, heads, dim, ranks = shape
    whole = torch.randn(batch, length, heads, dim, device="cuda", dtype=dtype)
    made, places = windows(ranks, batch * length * heads * dim, dtype)
    tokens, own = split_sizes(length, ranks), split_sizes(heads, ranks)
    for rank in range(ranks):
        mine = torch.split(whole, own, dim=2)[rank].contiguous()
        push_tokens(mine, places, heads, offsets(own)[rank])
    for rank, window in enumerate(made):
        size = batch * tokens[rank] * heads * dim
        assert torch.equal(window[:size].view(batch, -1, heads, dim), torch.split(whole, tokens, dim=1)[rank])
        assert window[size:].isnan().all()
