"""A text encoder shared by the ranks of a worker group: `tp` ranks share its matrices, sets of them share the prompts.

Matrices are split as in Megatron-LM (arXiv 1909.08053): q, k, v and a feed-forward layer's inner projections by their
outputs (whole heads), the projections that follow by their inputs, so that one sum over the ranks ends each half of a
layer; the embedding table by its rows. Shares may differ by one head. Works on gloo and NCCL; every rank of a group
must make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.parallel.ulysses import split_sizes


def share_of(total: int, *, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Where this rank's share of `total` begins, and its size. Shares differ by at most one."""
    if group is None:
        return 0, total
    sizes, rank = split_sizes(total, dist.get_world_size(group)), dist.get_rank(group)
    return sum(sizes[:rank]), sizes[rank]


def sum_over_ranks(x: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of every rank's x, on every rank, added in float32 and rounded once. Any shape; no inverse."""
    if group is None:
        return x
    total = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)


def sum_results(layer: nn.Linear, *, group: dist.ProcessGroup | None) -> None:
    """From now on a layer that holds this rank's columns of a matrix gives the whole matrix's result."""
    if group is not None:
        layer.register_forward_hook(lambda _layer, _inputs, part: sum_over_ranks(part, group=group))


class SplitEmbedding(nn.Embedding):
    """ids: (B, T) -> (B, T, E) from a table whose rows the ranks share. Exact: one rank has each row, others add 0."""

    def __init__(self, rows: int, width: int, *, group: dist.ProcessGroup | None) -> None:
        start, size = share_of(rows, group=group)
        super().__init__(size, width)
        self.start, self.size, self.group = start, size, group

    def forward(self, ids: Tensor) -> Tensor:
        own = (ids >= self.start) & (ids < self.start + self.size)
        found = super().forward(torch.where(own, ids - self.start, 0))
        return sum_over_ranks(torch.where(own[..., None], found, 0), group=self.group)


@dataclass(frozen=True, slots=True)
class EncoderGroups:
    """Who shares the encoder: the `tp` group of this rank's set, and all ranks; None where there is one rank."""

    tp: dist.ProcessGroup | None = None
    world: dist.ProcessGroup | None = None
    size: int = 1  # of each set
    sets: int = 1

    @staticmethod
    def of(mesh: ParallelMesh | None) -> EncoderGroups:
        return EncoderGroups() if mesh is None else EncoderGroups(mesh.tp_group, mesh.world, *mesh.encoder)

    def encode(
        self, lengths: Sequence[int], width: int, run: Callable[[list[int]], list[Tensor]], like: Tensor
    ) -> list[Tensor]:
        """Every prompt's (T_i, E) on every rank; `lengths` are the T_i, E is `width`, and `run` encodes the prompts of
        the numbers it is given on this rank's set. `like`: a tensor of the results' dtype and device.

        Sets take different prompts, each of which travels to all ranks once: what one GPU does in one batch then takes
        as long as its longest part. With one set, or one prompt, every set runs them all and nothing is sent.
        """
        count = len(lengths)
        if self.world is None or self.sets == 1 or count < 2:
            return run(list(range(count)))
        owners = [number * self.sets // count for number in range(count)]
        mine = dist.get_rank(self.world) // self.size
        own = [number for number, owner in enumerate(owners) if owner == mine]
        made: dict[int, Tensor] = dict(zip(own, run(own), strict=True)) if own else {}
        rows: list[Tensor] = []
        for number, owner in enumerate(owners):
            row = made[number].contiguous() if number in made else like.new_empty(lengths[number], width)
            if row.numel():
                dist.broadcast(row, dist.get_global_rank(self.world, owner * self.size), group=self.world)
            rows.append(row)
        return rows
