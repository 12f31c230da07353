"""How many ranks go to which axis."""

from __future__ import annotations

from safelight.runtime.errors import ConfigError
from safelight.runtime.parallel.mesh import Axis, ParallelMesh


def choose_degrees(world_size: int, heads: int, guided: bool) -> tuple[int, int, int]:
    """(cfg, ring, ulysses) for a worker group of `world_size` ranks.

    Guidance is split first, because the two predictions need nothing of each other, and the rest goes to Ulysses,
    whose share of the heads need not be even. Raises ConfigError when there are more Ulysses ranks than heads: the
    surplus ranks would idle in every attention.
    """
    cfg = 2 if guided and world_size % 2 == 0 else 1
    ulysses = world_size // cfg
    if ulysses > heads:
        raise ConfigError(
            f"{ulysses} ranks cannot share {heads} attention heads (Ulysses gives each at least one); "
            f"use at most {heads * cfg} ranks in a group",
            param="num_gpus",
        )
    return cfg, 1, ulysses


def require_no_ring(mesh: ParallelMesh) -> None:
    """Raises ConfigError for a ring degree above 1: ring attention is not built yet."""
    if mesh.degree(Axis.RING) > 1:
        raise ConfigError(
            f"ring degree 1 expected, got {mesh.degree(Axis.RING)}: ring attention is not available; "
            "give those ranks to Ulysses",
            param="ring_degree",
        )
