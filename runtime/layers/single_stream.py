"""Attention and feed-forward of single-stream blocks: one set of weights for text and image tokens, no biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safelight.kernels.dispatch import KernelSet
from safelight.runtime.layers.linear import Adapters, Linear, adapters_of
from safelight.runtime.layers.norm import HeadNorm
from safelight.runtime.layers.rope import Rotary
from safelight.runtime.parallel.sequence import SequenceGroups


class HeadAttention(nn.Module):
    """x: (B, S/sp, E) -> (B, S/sp, E), attending over all S = `length` tokens; q and k are RMS-normed over each head's
    D, then rotated. `rotary` holds this rank's tokens."""

    def __init__(self, width: int, heads: int, eps: float, kernels: KernelSet, *, groups: SequenceGroups) -> None:
        super().__init__()
        self.heads, self.kernels, self.groups = heads, kernels, groups
        self.qkv = Linear(width, 3 * width, bias=False)
        self.norm_q = HeadNorm(width // heads, eps, kernels)
        self.norm_k = HeadNorm(width // heads, eps, kernels)
        self.out = Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, length: int, adapters: Adapters | None = None) -> Tensor:
        q, k, v = self.qkv(x, adapters_of(adapters, "qkv")).chunk(3, dim=-1)
        v = torch.unflatten(v, 2, (self.heads, -1))
        attended = self.groups.attention(self.norm_q(q, *rotary), self.norm_k(k, *rotary), v, length, self.kernels)
        y: Tensor = self.out(attended.flatten(2), adapters_of(adapters, "out"))
        return y


class GatedFeedForward(nn.Module):
    """x: (B, S, E) -> (B, S, E): down(silu(a) * b), where a and b are the halves of `up`."""

    def __init__(self, width: int, hidden: int, kernels: KernelSet) -> None:
        super().__init__()
        self.kernels = kernels
        self.up = Linear(width, 2 * hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, adapters: Adapters | None = None) -> Tensor:
        hidden = self.kernels.silu_gate(self.up(x, adapters_of(adapters, "up")))
        y: Tensor = self.down(hidden, adapters_of(adapters, "down"))
        return y
