"""Norms with weights. Norms without weights are `KernelSet.layer_norm_modulate`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safelight.kernels.dispatch import KernelSet


class RMSNorm(nn.Module):
    """Over the whole last dim; `rotated` also applies rotary positions (one pass over memory)."""

    def __init__(self, width: int, eps: float, kernels: KernelSet) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.kernels.rms_norm_rope(x, self.weight, cos, sin, self.eps)


class HeadNorm(nn.Module):
    """x: (B, S, E) -> (B, S, H, D): every head RMS-normed over its D and rotated; cos, sin: (S, D/2). Written to `out`,
    rows of (B, S, E), when given."""

    def __init__(self, head_dim: int, eps: float, kernels: KernelSet) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.head_dim, self.eps, self.kernels = head_dim, eps, kernels

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
        normed = self.kernels.rms_norm_rope_heads(x, self.weight, cos, sin, self.eps, out)
        return torch.unflatten(normed, 2, (x.shape[2] // self.head_dim, self.head_dim))


class LayerNorm(nn.Module):
    """With weight and bias, both float32 whatever the model's dtype."""

    def __init__(self, width: int, eps: float, kernels: KernelSet) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)
