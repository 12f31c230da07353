"""Every op in plain torch: the definition of correct. `kernels/dispatch.py` states the contracts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.numel() == 0:  # a rank without heads or tokens: torch's kernels on CUDA return nothing then
        return torch.empty_like(q)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_unit_rms(x, eps) * weight.float()).to(x.dtype)


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    normed = _unit_rms(x, eps) * weight.float()
    return _rotated(torch.unflatten(normed, -1, (weight.numel() // (2 * cos.shape[-1]), -1)), cos, sin).to(x.dtype)


def rms_norm_rope_heads(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    heads = torch.unflatten(x, -1, (x.shape[-1] // weight.numel(), weight.numel()))
    rotated = _rotated(_unit_rms(heads, eps) * weight.float(), cos, sin)
    return rotated.to(x.dtype) if out is None else out.copy_(rotated)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return (F.layer_norm(x.float(), x.shape[-1:], None, None, eps) * (1 + scale) + shift).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return (x.float() + y.float() * gate).to(x.dtype)


def gelu_beside(x: Tensor, hidden: Tensor) -> Tensor:
    return torch.cat((x, F.gelu(hidden, approximate="tanh")), dim=-1)


def rms_norm_scale(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    return (_unit_rms(x, eps) * weight.float() * (1 + scale)).to(x.dtype)


def gated_rms_norm(x: Tensor, y: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    return (x.float() + _unit_rms(y, eps) * weight.float() * gate).to(x.dtype)


def silu_gate(x: Tensor) -> Tensor:
    gate, value = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * value).to(x.dtype)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads: (B, S, H, D) float32, cos, sin: (S, D/2) -> (B, S, H D)."""
    even, odd = torch.unflatten(heads, -1, (cos.shape[-1], 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-3)


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
