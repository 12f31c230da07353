"""The two collectives of sequence parallelism alone, over all ranks: microseconds and GB/s by size of message.

What `configs/parallel_costs.py` assumes of a machine: the largest message's rate is its `link`, the smallest one's time
its `latency_s`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from parallel_plan import Case
    from parallel_ranks import World

TOKENS, WIDTH, BRANCHES, ITEM_BYTES = 32760, 1536, 2, 2  # Wan 1.3B at 832x480, 81 frames, bfloat16
BACK_TO_BACK = 10


def links(world: World, case: Case) -> dict[str, Any]:
    """Bytes are those that one rank sends to others; time is the slowest rank's."""
    whole = 3 * BRANCHES * TOKENS * WIDTH * ITEM_BYTES // world.size  # q, k and v of one layer on one rank
    sizes = (4096, 1 << 20, 1 << 24, whole // 3, whole) if world.device.type == "cuda" else (4096, 1 << 16)
    found = {"all_to_all": [_row(world, _all_to_all, n) for n in sizes], "ring": [_row(world, _ring, n) for n in sizes]}
    best = {f"{name}_gb_s": max(row["gb_s"] for row in rows) for name, rows in found.items()}
    least = {f"{name}_latency_us": min(row["us"] for row in rows) for name, rows in found.items()}
    return {**best, **least, **found}


def _row(world: World, make: Callable[[World, int], tuple[Callable[[], None], int]], nbytes: int) -> dict[str, float]:
    call, sent = make(world, nbytes)

    def several() -> None:
        for _ in range(BACK_TO_BACK):
            call()

    several()
    world.wait()
    microseconds = world.median(several)["ms"] * 1e3 / BACK_TO_BACK
    world.wait()
    start = time.perf_counter()
    several()
    enqueued = (time.perf_counter() - start) * 1e6 / BACK_TO_BACK
    return {
        "sent_bytes": sent,
        "us": round(microseconds, 1),
        "host_us": round(enqueued, 1),
        "gb_s": round(sent / microseconds / 1e3, 1),
    }


def _all_to_all(world: World, nbytes: int) -> tuple[Callable[[], None], int]:
    part = nbytes // world.size
    send = torch.zeros(part * world.size, dtype=torch.uint8, device=world.device)
    received, sizes = torch.empty_like(send), [part] * world.size

    def call() -> None:
        dist.all_to_all_single(received, send, sizes, sizes, group=world.group)

    return call, part * (world.size - 1)


def _ring(world: World, nbytes: int) -> tuple[Callable[[], None], int]:
    send = torch.zeros(nbytes, dtype=torch.uint8, device=world.device)
    received, rank = torch.empty_like(send), world.peers.rank
    after, before = (rank + 1) % world.size, (rank - 1) % world.size

    def call() -> None:
        ops = [
            dist.P2POp(dist.isend, send, after, world.group),
            dist.P2POp(dist.irecv, received, before, world.group),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    return call, nbytes
