"""The one mesh of a worker group: which ranks form the cfg, ring and ulysses groups.

Built once in the worker's main and handed down; nothing here is global. Ulysses is innermost, so that its all-to-all
stays on the fastest links (rank = (cfg * ring_degree + ring) * ulysses_degree + ulysses).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch.distributed as dist
from torch import Tensor

from safelight.runtime.parallel.peer_window import PeerWindow, least_memory, open_window
from safelight.runtime.parallel.yunchang import yunchang_attention


class Axis(Enum):
    CFG = "cfg"
    RING = "ring"
    ULYSSES = "ulysses"


@dataclass(frozen=True, slots=True)
class ParallelMesh:
    """Degrees, this rank's coordinates, and one process group per axis (None where the degree is 1)."""

    rank: int
    world_size: int
    degrees: dict[Axis, int]
    groups: dict[Axis, dist.ProcessGroup | None]
    world: dist.ProcessGroup | None
    even_attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # yunchang's, if it is wanted
    encoder: tuple[int, int] = (1, 1)  # tp: ranks that share its matrices; sets of them that share the prompts
    tp_group: dist.ProcessGroup | None = None
    window: PeerWindow | None = None  # of the Ulysses group, see there
    device_bytes: int | None = None  # memory of the smallest of the ranks' GPUs; None: not known

    @staticmethod
    def single() -> ParallelMesh:
        """The mesh of one rank: no process groups."""
        return ParallelMesh(0, 1, dict.fromkeys(Axis, 1), dict.fromkeys(Axis, None), None)

    def degree(self, axis: Axis) -> int:
        return self.degrees[axis]

    def coordinate(self, axis: Axis) -> int:
        """This rank's place along an axis."""
        u, r = self.degrees[Axis.ULYSSES], self.degrees[Axis.RING]
        return {Axis.ULYSSES: self.rank % u, Axis.RING: self.rank // u % r, Axis.CFG: self.rank // (u * r)}[axis]

    @property
    def sequence_size(self) -> int:
        """Ranks that share a sequence."""
        return self.degrees[Axis.RING] * self.degrees[Axis.ULYSSES]

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        return self.groups[axis]


def build_mesh(
    world: dist.ProcessGroup,
    cfg: int,
    ring: int,
    ulysses: int,
    sp_impl: str = "native",
    encoder: tuple[int, int] = (1, 1),
    transport: str = "auto",
) -> ParallelMesh:
    """Collective over all ranks of the worker group: makes the sub-groups of each axis, and those of the text encoder.
    `transport` of Ulysses: `auto` writes to peers' memory where that is possible, `nccl` never does.

    Raises ValueError when the degrees do not multiply to the world size or `encoder` (tp, sets) does not fit it,
    ConfigError when `sp_impl` cannot be had.
    """
    size, rank = dist.get_world_size(world), dist.get_rank(world)
    if cfg * ring * ulysses != size:
        raise ValueError(f"cfg {cfg} x ring {ring} x ulysses {ulysses} is not the group's size {size}")
    tp, sets = encoder
    if size % tp or sets not in (1, size // tp):
        raise ValueError(f"{sets} sets of {tp} ranks do not make up the group's {size}")
    degrees = {Axis.CFG: cfg, Axis.RING: ring, Axis.ULYSSES: ulysses}
    strides = {Axis.ULYSSES: 1, Axis.RING: ulysses, Axis.CFG: ulysses * ring}
    groups: dict[Axis, dist.ProcessGroup | None] = dict.fromkeys(Axis, None)
    for axis, degree in degrees.items():
        if degree == 1:
            continue
        stride = strides[axis]
        starts = [r for r in range(size) if r // stride % degree == 0]
        for start in starts:
            members = [start + i * stride for i in range(degree)]
            group = dist.new_group(members)
            if rank in members:
                groups[axis] = group
    even = yunchang_attention(ulysses, ring, rank, size) if sp_impl == "yunchang" else None
    least = least_memory(world) if "nccl" in dist.get_backend(world) else None
    window, sharers = None, groups[Axis.ULYSSES]
    if least is not None and sharers is not None and transport == "auto" and even is None:
        window = open_window(sharers, least)
    return ParallelMesh(rank, size, degrees, groups, world, even, encoder, _tp_group(world, tp), window, least)


def _tp_group(world: dist.ProcessGroup, tp: int) -> dist.ProcessGroup | None:
    """Neighbouring ranks: they are on one host as long as `tp` fits."""
    size, rank = dist.get_world_size(world), dist.get_rank(world)
    if tp in (1, size):
        return None if tp == 1 else world
    made = [dist.new_group(list(range(start, start + tp))) for start in range(0, size, tp)]
    own = made[rank // tp]
    assert isinstance(own, dist.ProcessGroup)
    return own
