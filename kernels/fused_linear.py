"""A matrix product whose activation is computed before the result leaves the registers."""

from __future__ import annotations

import torch
from torch import Tensor

from safelight.kernels.reference import ops as reference

_HALVES = (torch.bfloat16, torch.float16)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear_gelu` of `kernels/dispatch.py` on CUDA, by cuBLASLt's epilogue: rounded once, from float32.

    torch has the epilogue in an operation with a leading underscore; where it is gone, and in float32 (whose epilogue
    would be the same work), the product and the activation are two kernels.
    """
    fused = getattr(torch, "_addmm_activation", None)
    if fused is None or x.dtype not in _HALVES or x.numel() == 0:
        return reference.linear_gelu(x, weight, bias)
    rows: Tensor = fused(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], -1)
