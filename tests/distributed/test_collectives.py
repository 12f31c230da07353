"""The shard and unshard functions, as properties over random shapes on 2 and 4 gloo processes, and their pure parts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_processes import run_ranks

from safelight.kernels.reference.attention import attention_lse
from safelight.runtime.parallel.cfg import gather_branches, own_branches
from safelight.runtime.parallel.mesh import Axis, ParallelMesh
from safelight.runtime.parallel.ring import merge
from safelight.runtime.parallel.ulysses import split_sizes, tokens_to_heads

RANKS = Path(__file__).with_name("collective_ranks.py")


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_move_what_they_say_and_their_inverses_undo_it(tmp_path: Path, world: int) -> None:
    run_ranks(RANKS, world, tmp_path, tmp_path)
    for rank in range(world):
        assert len((tmp_path / f"{rank}.txt").read_text().splitlines()) == 8


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 64))
def test_shares_differ_by_at_most_one_and_add_up(total: int, parts: int) -> None:
    sizes = split_sizes(total, parts)
    assert len(sizes) == parts
    assert sum(sizes) == total
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 16), st.integers(1, 16))
def test_shares_of_shares_differ_by_at_most_one_too(total: int, ring: int, ulysses: int) -> None:
    shares = [share for chunk in split_sizes(total, ring) for share in split_sizes(chunk, ulysses)]
    assert max(shares) - min(shares) <= 1


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(0, 6))
def test_merging_two_parts_is_attention_over_both(first: int, second: int) -> None:
    generator = torch.Generator().manual_seed(first * 7 + second)
    q = torch.randn(2, 3, 2, 4, generator=generator)
    k, v = torch.randn(2, 2, first + second, 2, 4, generator=generator) * 3
    whole, whole_lse = attention_lse(q, k, v)
    out, lse = merge(*attention_lse(q, k[:, :first], v[:, :first]), *attention_lse(q, k[:, first:], v[:, first:]))
    torch.testing.assert_close(out, whole, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=2e-6, rtol=1e-5)


def test_merging_nothing_with_nothing_is_nothing() -> None:
    zeros, nothing = torch.zeros(1, 2, 1, 3), torch.full((1, 2, 1), -math.inf)
    out, lse = merge(zeros, nothing, zeros, nothing)
    assert torch.equal(out, zeros)
    assert torch.equal(lse, nothing)


def test_not_a_number_is_not_taken_for_nothing() -> None:
    zeros, nothing = torch.zeros(1, 1, 1, 3), torch.full((1, 1, 1), -math.inf)
    out, lse = merge(zeros, nothing, zeros + math.nan, nothing + math.nan)
    assert out.isnan().all()
    out, lse = merge(out, lse, zeros, nothing + 1)
    assert out.isnan().all()
    assert lse.isnan().all()


def test_one_rank_moves_nothing() -> None:
    q = torch.randn(1, 5, 3, 2)
    assert tokens_to_heads((q,), 5, group=None)[0] is q
    assert gather_branches(q, 1, group=None) is q


def test_an_unguided_state_is_predicted_by_every_cfg_rank() -> None:
    mesh = ParallelMesh(1, 2, {Axis.CFG: 2, Axis.RING: 1, Axis.ULYSSES: 1}, dict.fromkeys(Axis, None), None)
    assert own_branches(mesh, 1) == range(1)
    assert own_branches(mesh, 2) == range(1, 2)
