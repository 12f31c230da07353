"""Self-attention with rotary positions, over all ranks that share the sequence, and cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safelight.kernels.dispatch import KernelSet
from safelight.runtime.layers.linear import Adapters, Linear, adapters_of
from safelight.runtime.layers.norm import RMSNorm
from safelight.runtime.layers.rope import Rotary
from safelight.runtime.parallel.sequence import SequenceGroups


class SelfAttention(nn.Module):
    """x: (B, S/sp, E) -> (B, S/sp, E), attending over all S tokens; q and k are RMS-normed across heads, then rotated.

    `rotary` holds this rank's tokens; `length` is S. Shares follow `SequenceGroups.shard`.
    """

    def __init__(self, width: int, heads: int, eps: float, kernels: KernelSet, *, groups: SequenceGroups) -> None:
        super().__init__()
        self.heads, self.kernels, self.groups = heads, kernels, groups
        self.qkv = Linear(width, 3 * width)
        self.norm_q = RMSNorm(width, eps, kernels)
        self.norm_k = RMSNorm(width, eps, kernels)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary, length: int, adapters: Adapters | None = None) -> Tensor:
        q, k, v = self.qkv(x, adapters_of(adapters, "qkv")).chunk(3, dim=-1)
        q = torch.unflatten(self.norm_q.rotated(q, *rotary), 2, (self.heads, -1))
        k = torch.unflatten(self.norm_k.rotated(k, *rotary), 2, (self.heads, -1))
        v = torch.unflatten(v, 2, (self.heads, -1))
        attended = self.groups.attention(q, k, v, length, self.kernels)
        y: Tensor = self.out(attended.flatten(2), adapters_of(adapters, "out"))
        return y


class CrossAttention(nn.Module):
    """x: (B, S/sp, E), context: (B, T, E) -> (B, S/sp, E). Every rank holds the whole context and all heads."""

    def __init__(self, width: int, heads: int, eps: float, kernels: KernelSet) -> None:
        super().__init__()
        self.heads, self.kernels = heads, kernels
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.norm_q = RMSNorm(width, eps, kernels)
        self.norm_k = RMSNorm(width, eps, kernels)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, adapters: Adapters | None = None) -> Tensor:
        q = torch.unflatten(self.norm_q(self.q(x, adapters_of(adapters, "q"))), 2, (self.heads, -1))
        k, v = self.kv(context, adapters_of(adapters, "kv")).chunk(2, dim=-1)
        k, v = torch.unflatten(self.norm_k(k), 2, (self.heads, -1)), torch.unflatten(v, 2, (self.heads, -1))
        y: Tensor = self.out(self.kernels.attention(q, k, v).flatten(2), adapters_of(adapters, "out"))
        return y
