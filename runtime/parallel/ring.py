"""Ring attention (arXiv 2310.01889): keys and values travel around the ring, queries stay.

Rank i of r holds chunk i of the tokens; chunks may have different lengths, 0 included. While one chunk is attended to,
the next is in flight. Works on gloo and NCCL. Every rank of the group must make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

AttentionLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[int], attention_lse: AttentionLse, *, group: dist.ProcessGroup
) -> Tensor:
    """q, k, v: (B, chunks[i], H, D) on rank i -> (B, chunks[i], H, D), attending over all sum(chunks) tokens.

    Each rank sends every chunk but its successor's once. Partial results are merged in float32 and rounded once.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    kv = torch.stack((k, v))
    merged: tuple[Tensor, Tensor] | None = None
    for turn in range(size):
        following, works = kv, []
        if turn + 1 < size:
            following = kv.new_empty((2, kv.shape[1], chunks[(rank - turn - 1) % size], *kv.shape[3:]))
            works = _pass_on(kv, following, group)
        if kv.numel():
            out, lse = attention_lse(q, kv[0], kv[1])
            merged = (out.float(), lse) if merged is None else merge(*merged, out, lse)
        for work in works:
            work.wait()
        kv = following
    return torch.zeros_like(q) if merged is None else merged[0].to(q.dtype)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from its parts: (B, S, H, D) and (B, S, H) each, `out` and both lse float32.

    A part without keys (-inf) has no weight; two of them stay zeros and -inf.
    """
    share = torch.sigmoid(other_lse - lse)  # exp(other_lse) / (exp(lse) + exp(other_lse))
    weight = torch.where(other_lse == -torch.inf, 0.0, share)
    return torch.lerp(out, other.float(), weight[..., None]), torch.logaddexp(lse, other_lse)


def _pass_on(kv: Tensor, following: Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
    """Starts sending `kv` to the next rank and receiving the previous rank's into `following`; empty ones do not go."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    successor = dist.get_global_rank(group, (rank + 1) % size)
    predecessor = dist.get_global_rank(group, (rank - 1) % size)
    ops = [dist.P2POp(dist.isend, kv, successor, group), dist.P2POp(dist.irecv, following, predecessor, group)]
    ops = [op for op in ops if op.tensor.numel()]
    return dist.batch_isend_irecv(ops) if ops else []
