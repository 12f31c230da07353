"""The key-value store that torchrun runs for its ranks. It is unauthenticated: no secret goes in, and what comes out is
bytes that msgspec checks."""

from __future__ import annotations

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

ENV_STORE = "env://"


def torchrun_store(prefix: str = "safelight") -> Store:
    """A new connection to it. Keys outlive the ranks: those of a restarted round meet the ones of the round before."""
    store, _rank, _world_size = next(rendezvous(ENV_STORE))
    return PrefixStore(prefix, store)
