"""One rank of the collectives' property tests; `test_collectives.py` starts it.

Hypothesis draws the same examples on every rank (derandomised), and the ranks agree on every verdict before one of them
raises, so that all shrink alike. Results: FOLDER/RANK.txt has a line for each property that holds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safelight.kernels.reference.attention import attention_lse
from safelight.runtime.parallel import peer_window
from safelight.runtime.parallel.cfg import gather_branches
from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh
from safelight.runtime.parallel.ring import ring_attention
from safelight.runtime.parallel.sequence import SequenceGroups
from safelight.runtime.parallel.ulysses import (
    gather_tokens,
    heads_to_tokens,
    shard_tokens,
    split_sizes,
    tokens_to_heads,
)

EXAMPLES = 40
SIZES = {"batch": st.integers(1, 3), "length": st.integers(0, 13), "heads": st.integers(1, 7), "dim": st.integers(1, 3)}


def agreed(group: dist.ProcessGroup, holds: bool) -> None:
    """Raises AssertionError on every rank when it does not hold on one."""
    verdict = torch.tensor(holds, dtype=torch.int32)
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN, group=group)
    assert verdict.item()


def numbered(*shape: int) -> Tensor:
    """Every element another number: nothing can be swapped unseen."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def properties(group: dist.ProcessGroup) -> dict[str, Callable[[], None]]:
    """Each a hypothesis test over one axis of all ranks, and the two-axis mesh where there are four."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    axes = (2, 2) if world == 4 else (world, 1)
    groups = SequenceGroups.of(build_mesh(group, cfg=1, ring=axes[0], ulysses=axes[1]))
    check = settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None)

    @check
    @given(**SIZES)
    def tokens_and_heads(batch: int, length: int, heads: int, dim: int) -> None:
        whole = tuple(numbered(batch, length, heads, dim) + 1000 * i for i in range(3))
        shards = tuple(shard_tokens(t, group=group) for t in whole)
        by_head = tokens_to_heads(shards, length, group=group)
        mine = torch.arange(heads).tensor_split(world)[rank]
        moved = all(torch.equal(h, t[:, :, mine]) for h, t in zip(by_head, whole, strict=True))
        back = torch.equal(heads_to_tokens(by_head[1], heads, group=group), shards[1])
        agreed(group, moved and back)

    @check
    @given(**SIZES)
    def shard_and_gather(batch: int, length: int, heads: int, dim: int) -> None:
        whole = numbered(batch, length, heads, dim)
        share = shard_tokens(whole, group=group)
        cut = torch.equal(share, whole.tensor_split(world, dim=1)[rank])
        agreed(group, cut and torch.equal(gather_tokens(share, length, group=group), whole))

    @check
    @given(**SIZES)
    def nested_shard_and_gather(batch: int, length: int, heads: int, dim: int) -> None:
        whole = numbered(batch, length, heads, dim)
        share = groups.shard(whole)
        even = length // world <= share.shape[1] <= -(-length // world)
        agreed(group, even and torch.equal(groups.gather(share, length), whole))

    @check
    @given(**SIZES)
    def rings_attend_to_everything(batch: int, length: int, heads: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(length)
        q, k, v = torch.randn(3, batch, length, heads, dim, generator=generator)
        cut = [shard_tokens(t, group=group) for t in (q, k, v)]
        out = ring_attention(cut[0], cut[1], cut[2], split_sizes(length, world), attention_lse, group=group)
        expected = shard_tokens(attention_lse(q, k, v)[0], group=group)
        agreed(group, torch.allclose(out, expected, atol=1e-5, rtol=0))

    @check
    @given(chunks=st.lists(st.integers(0, 5), min_size=world, max_size=world))
    def rings_take_chunks_of_any_lengths(chunks: list[int]) -> None:
        generator = torch.Generator().manual_seed(sum(chunks))
        q, k, v = torch.randn(3, 1, sum(chunks), 2, 4, generator=generator)
        cut = [torch.split(t, chunks, dim=1)[rank] for t in (q, k, v)]
        out = ring_attention(cut[0], cut[1], cut[2], chunks, attention_lse, group=group)
        expected = torch.split(attention_lse(q, k, v)[0], chunks, dim=1)[rank]
        agreed(group, torch.allclose(out, expected, atol=1e-5, rtol=0))

    @check
    @given(**SIZES)
    def branches_come_back_in_order(batch: int, length: int, heads: int, dim: int) -> None:
        whole = numbered(world * batch, length, heads, dim)
        agreed(group, torch.equal(gather_branches(whole[rank * batch :][:batch], len(whole), group=group), whole))

    found = (tokens_and_heads, shard_and_gather, nested_shard_and_gather, rings_attend_to_everything,
             rings_take_chunks_of_any_lengths, branches_come_back_in_order)  # fmt: skip
    return {check.__name__: check for check in found}


def next_chunk_travels_while_one_is_attended_to(group: dist.ProcessGroup) -> None:
    """The order of what every rank does: pass on, attend, wait, and only attend in the last turn."""
    events: list[str] = []
    start = dist.batch_isend_irecv

    class Work:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def batch(ops: list[dist.P2POp]) -> list[Work]:
        events.append("pass on")
        return [Work(work) for work in start(ops)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        events.append("attend")
        return attention_lse(q, k, v)

    world = dist.get_world_size(group)
    q = torch.randn(1, 2, 1, 4)
    with mock.patch.object(dist, "batch_isend_irecv", batch):
        ring_attention(q, q, q, [2] * world, attend, group=group)
    agreed(group, events == ["pass on", "attend", "wait", "wait"] * (world - 1) + ["attend"])


def what_fails_on_one_rank_is_had_by_none(group: dist.ProcessGroup) -> None:
    """Opening a window: no rank goes on with one that another has not got, and no rank waits for it."""
    rank, cpu = dist.get_rank(group), torch.device("cpu")

    def opened(failing: int | None) -> str:
        if rank == failing:
            raise RuntimeError("not here")
        return "open"

    found = [peer_window._together(group, cpu, lambda f=failing: opened(f)) for failing in (None, 0, 1)]  # type: ignore[misc]
    agreed(group, found == ["open", None, None])


def main(rank: int, world: int, group: dist.ProcessGroup, folder: Path) -> None:
    single = SequenceGroups.of(ParallelMesh.single())
    assert single.alone
    with (folder / f"{rank}.txt").open("w") as lines:
        next_chunk_travels_while_one_is_attended_to(group)
        lines.write("overlap\n")
        what_fails_on_one_rank_is_had_by_none(group)
        lines.write("together\n")
        for name, holds in properties(group).items():
            holds()
            lines.write(f"{name}\n")
