"""Attention with its log-sum-exp in plain torch: the definition of correct. Contract in `kernels/dispatch.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Holds all (B, H, S, T) scores in float32: for small shapes, and for those that no fused kernel takes.

    Without keys (T = 0) the sums are empty: zeros, and a log-sum-exp of -inf.
    """
    scores = torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    out = torch.einsum("bhst,bthd->bshd", (scores - lse).exp(), v.float())
    return out.to(q.dtype), lse[..., 0].transpose(1, 2)
