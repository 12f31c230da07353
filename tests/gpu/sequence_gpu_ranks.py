"""One rank of the attention tests over several GPUs; `test_sequence_gpu.py` starts it.

Checks every layout of ring and Ulysses on even and uneven shapes: through windows of peers' memory, through NCCL, and
by yunchang where it is installed.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch
import torch.distributed as dist

from safelight.kernels.dispatch import KernelSet, select_kernels
from safelight.kernels.reference.attention import attention_lse
from safelight.runtime.parallel.mesh import build_mesh
from safelight.runtime.parallel.sequence import SequenceGroups

# B, S, H, D; the last two leave a rank of two without tokens or heads, which is what messages are for
SHAPES = [(1, 512, 8, 128), (2, 333, 5, 64), (1, 3, 12, 128), (1, 1, 12, 128), (1, 9, 1, 64)]


def main(rank: int, world: int, group: dist.ProcessGroup) -> None:
    device, kernels = torch.device("cuda", rank), select_kernels(torch.device("cuda"))
    installed = all(importlib.util.find_spec(name) for name in ("flash_attn", "yunchang"))
    ways = [("native", "auto"), ("native", "nccl"), *([("yunchang", "nccl")] if installed else [])]
    for impl, transport in ways:
        for ring in (r for r in range(1, world + 1) if world % r == 0):
            mesh = build_mesh(group, cfg=1, ring=ring, ulysses=world // ring, sp_impl=impl, transport=transport)
            groups = SequenceGroups.of(mesh)
            assert (mesh.window is not None) == (transport == "auto" and ring < world)
            for shape in SHAPES * 2:  # a window that is used again
                generator = torch.Generator().manual_seed(5)
                q, k, v = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(3))
                shares = [groups.shard(x).contiguous() for x in (q, k, v)]
                made = groups.attention(shares[0], shares[1], shares[2], shape[1], kernels)
                exact = attention_lse(q.float(), k.float(), v.float())[0]
                torch.testing.assert_close(made.float(), groups.shard(exact), atol=0.02, rtol=0.01)
                whole = groups.gather(made, shape[1])
                assert whole.shape == q.shape
            if mesh.window is not None:
                exchanges_do_not_overtake_each_other(groups, kernels, rank, world)


def exchanges_do_not_overtake_each_other(groups: SequenceGroups, kernels: KernelSet, rank: int, world: int) -> None:
    """Many layers in a row, now one rank late and now another: nothing is overwritten before it is read."""
    generator = torch.Generator("cuda").manual_seed(1)  # the same on every rank
    layers = [torch.randn(3, 1, 2048, 8, 64, device="cuda", generator=generator) for _ in range(20)]
    shares = [[groups.shard(t).contiguous() for t in layer] for layer in layers]
    made = []
    for number, (q, k, v) in enumerate(shares):
        if number % world == rank:
            torch.cuda._sleep(3_000_000)  # type: ignore[no-untyped-call]
        out = groups.attention(q, k, v, 2048, kernels)
        if number % world != rank:
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
        made.append(out.clone())
    plain = replace(groups, window=None)
    for (q, k, v), ours in zip(shares, made, strict=True):
        torch.testing.assert_close(ours, plain.attention(q, k, v, 2048, kernels), rtol=0, atol=1e-5)
