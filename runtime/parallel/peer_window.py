"""Ulysses without messages: GPUs of one host write queries, keys, values and results straight into each other's
memory.

An all-to-all of NCCL needs its blocks packed before and unpacked behind it, and costs some fifty microseconds beside
the transfer, a hundred times a step. Here one kernel reads a row where it is and stores it where the peer reads it
(kernels/triton/exchange.py), and a barrier follows. Memory of peers comes from torch's symmetric memory (CUDA virtual
memory shared between processes; multicast is not used).

Why one window is enough. It has two parts: heads come into the first (q, k, v before attention), tokens into the second
(the result behind it). A peer's stores of the next layer into the first part begin behind this layer's second barrier,
which every rank reaches when its attention has read the first part; stores into the second part begin behind the next
layer's first barrier, which every rank reaches when it has used what is in the second. The parts never overlap,
whatever the shapes. So a result is valid until the next exchange, and a forward must call them in turn.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from safelight.runtime.parallel.ulysses import offsets, split_sizes

WINDOW_BYTES = 3 << 29  # of which a quarter is for tokens; larger exchanges, where NCCL's share is small, go through it
log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PeerWindow:
    """This rank's window and the addresses of its peers', over one Ulysses group."""

    memory: Tensor  # (n,) uint8
    to_heads: Tensor  # (u,) int64: where the first part of each rank's window begins
    to_tokens: Tensor  # the same of the second part
    rank: int
    handle: Any  # of torch's symmetric memory

    @property
    def world(self) -> int:
        return self.to_heads.numel()

    def fits(self, batch: int, length: int, heads: int, dim: int, itemsize: int) -> bool:
        """Whether an attention over this shape can be exchanged here; the same on every rank.

        Not in compiled blocks: the compiler would see no stores in the kernels, and leave them out.
        """
        if min(length, heads) < self.world or torch.compiler.is_compiling():
            return False
        row = batch * dim * itemsize
        most = max(length * -(-heads // self.world), -(-length // self.world) * heads)
        return row * most <= self._border // 3

    @property
    def _border(self) -> int:
        return self.memory.numel() // 4 * 3

    def tokens_to_heads(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each (B, S/u, H, D) -> (B, S, H/u, D), S = `length`; valid until the next exchange."""
        from safelight.kernels.triton.exchange import push_heads

        batch, share, heads, dim = q.shape
        tokens, mine = split_sizes(length, self.world), split_sizes(heads, self.world)[self.rank]
        if share != tokens[self.rank]:
            raise ValueError(f"rank {self.rank} holds {share} tokens, its share of {length} is {tokens[self.rank]}")
        push_heads(_dense(q), _dense(k), _dense(v), self.to_heads, length, offsets(tokens)[self.rank])
        self.handle.barrier()
        q, k, v = self._view(0, q.dtype, 3, batch, length, mine, dim).unbind(0)
        return q, k, v

    def heads_to_tokens(self, x: Tensor, heads: int) -> Tensor:
        """(B, S, H/u, D) -> (B, S/u, H, D), H = `heads`; valid until the next exchange."""
        from safelight.kernels.triton.exchange import push_tokens

        batch, length, _, dim = x.shape
        push_tokens(_dense(x), self.to_tokens, heads, offsets(split_sizes(heads, self.world))[self.rank])
        self.handle.barrier()
        return self._view(self._border, x.dtype, batch, split_sizes(length, self.world)[self.rank], heads, dim)

    def _view(self, begin: int, dtype: torch.dtype, *shape: int) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.memory[begin : begin + size].view(dtype).view(shape)


def _dense(x: Tensor) -> Tensor:
    """With heads side by side in memory, whatever the strides of tokens."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def open_window(group: dist.ProcessGroup, least: int) -> PeerWindow | None:
    """Collective over a NCCL group whose ranks use the current CUDA device: its window, of at most a thirty-second of
    `least`, the memory of the smallest device; None where the devices cannot reach each other's memory."""
    device = torch.device("cuda", torch.cuda.current_device())
    if obstacle := _obstacle(group, device):
        log.warning("Ulysses goes through NCCL: %s", obstacle)
        return None
    size = min(WINDOW_BYTES, least // 32) // 1024 * 1024
    memory = _together(group, device, lambda: _allocate(group, device, size))
    return None if memory is None else _together(group, device, lambda: _meet(group, memory))


def _allocate(group: dist.ProcessGroup, device: torch.device, size: int) -> Tensor:
    """Memory that can be shared. torch calls this part of itself an alpha."""
    import torch.distributed._symmetric_memory as symmetric
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401

    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.11 needs the call, later ones announce its end
        symmetric.enable_symm_mem_for_group(group.group_name)
    memory: Tensor = symmetric.empty(size, dtype=torch.uint8, device=device)
    return memory


def _meet(group: dist.ProcessGroup, memory: Tensor) -> PeerWindow:
    """Collective: every rank's memory is mapped into the others."""
    import torch.distributed._symmetric_memory as symmetric

    handle: Any = symmetric.rendezvous(memory, group.group_name)
    places = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=memory.device)
    return PeerWindow(memory, places, places + memory.numel() // 4 * 3, dist.get_rank(group), handle)


def _together(group: dist.ProcessGroup, device: torch.device, call: Callable[[], T]) -> T | None:
    """What `call` gives on every rank; None, with a warning, when it fails on one."""
    made, failure = None, ""
    try:
        made = call()
    except (ImportError, AttributeError, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"
    if _agreed(group, device, int(not failure)):
        return made
    log.warning("Ulysses goes through NCCL, torch's symmetric memory failed: %s", failure or "on another rank")
    return None


def least_memory(group: dist.ProcessGroup) -> int:
    """Bytes of the smallest of the ranks' current CUDA devices. Collective."""
    device = torch.device("cuda", torch.cuda.current_device())
    return _agreed(group, device, torch.cuda.get_device_properties(device).total_memory)


def _agreed(group: dist.ProcessGroup, device: torch.device, value: int) -> int:
    """The least of all ranks' values."""
    told = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MIN, group=group)
    return int(told.item())


def _obstacle(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why a rank cannot write to another's memory; the same on every rank, empty when all can."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = socket.gethostname() + (boot.read_text() if boot.exists() else "")
    mine = torch.tensor([zlib.crc32(host.encode()), device.index or 0], dtype=torch.int64, device=device)
    told = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, mine, group=group)
    hosts, devices = zip(*(t.tolist() for t in told), strict=True)
    if found := apart(hosts, devices):
        return found
    others = [d for d in devices if d != device.index]
    reached = all(d < torch.cuda.device_count() and torch.cuda.can_device_access_peer(device, d) for d in others)
    return "" if _agreed(group, device, int(reached)) else "its devices cannot reach each other's memory"


def apart(hosts: Sequence[int], devices: Sequence[int]) -> str:
    """Why ranks of these hosts and devices have no memory in common; empty when they may."""
    if len(set(hosts)) > 1:
        return "its ranks are on several hosts"
    if len(set(devices)) < len(devices):
        return "each rank sees one device, so devices cannot be told apart"
    return ""
