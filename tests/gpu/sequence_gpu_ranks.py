"""One rank of the attention tests over several GPUs; `test_sequence_gpu.py` starts it.

Checks every layout of ring and Ulysses on even and uneven shapes, natively and by yunchang where it is installed.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.distributed as dist

from safelight.kernels.dispatch import select_kernels
from safelight.kernels.reference.attention import attention_lse
from safelight.runtime.parallel.mesh import build_mesh
from safelight.runtime.parallel.sequence import SequenceGroups

SHAPES = [(1, 512, 8, 128), (2, 333, 5, 64), (1, 3, 12, 128)]  # B, S, H, D


def main(rank: int, world: int, group: dist.ProcessGroup) -> None:
    device, kernels = torch.device("cuda", rank), select_kernels(torch.device("cuda"))
    installed = all(importlib.util.find_spec(name) for name in ("flash_attn", "yunchang"))
    for impl in ("native", "yunchang") if installed else ("native",):
        for ring in (r for r in range(1, world + 1) if world % r == 0):
            groups = SequenceGroups.of(build_mesh(group, cfg=1, ring=ring, ulysses=world // ring, sp_impl=impl))
            for shape in SHAPES:
                generator = torch.Generator().manual_seed(5)
                q, k, v = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(3))
                shares = [groups.shard(x).contiguous() for x in (q, k, v)]
                made = groups.attention(shares[0], shares[1], shares[2], shape[1], kernels)
                exact = attention_lse(q.float(), k.float(), v.float())[0]
                torch.testing.assert_close(made.float(), groups.shard(exact), atol=0.02, rtol=0.01)
                whole = groups.gather(made, shape[1])
                assert whole.shape == q.shape
