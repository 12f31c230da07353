"""Attention that also returns its log-sum-exp, from the fused kernels of torch and of flash-attn.

torch's public `scaled_dot_product_attention` keeps the log-sum-exp to itself, so the aten ops behind it are called by
name. Contract in `kernels/dispatch.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from safelight.kernels.reference.attention import attention_lse as definition
from safelight.runtime.errors import ConfigError

AttentionLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_HALF = (torch.float16, torch.bfloat16)
_HOPPER = (9, 0)  # from here on cuDNN's kernel is twice as fast as flash-attention 2


def attention_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest fused op of torch that takes these inputs; the definition where none does (or nothing is there)."""
    name = _op_name(q, k)
    if name is None:
        return definition(q, k, v)
    return aten_attention_lse(name, q, k, v)


def _op_name(q: Tensor, k: Tensor) -> str | None:
    if q.numel() == 0 or k.numel() == 0:  # torch's CPU kernel divides by the number of tokens
        return None
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda" or q.shape[-1] % 8:
        return None
    if q.dtype not in _HALF:
        return "efficient" if q.dtype == torch.float32 else None
    if q.shape[-1] <= 128 and k.shape[1] > 1 and _capability(q.device) >= _HOPPER:  # cuDNN takes no single key
        return "cudnn"
    return "flash" if q.shape[-1] <= 256 and _capability(q.device) >= (8, 0) else "efficient"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def aten_attention_lse(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One op by name: `cpu`, `cudnn`, `flash` or `efficient` (any of them may pad the log-sum-exp's rows)."""
    aten: Any = torch.ops.aten
    inputs = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if name == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*inputs)
    elif name == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(*inputs, None, True)[:2]
    elif name == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(*inputs)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(*inputs, None, True)[:2]
    lse = lse.flatten(2)[:, :, : q.shape[1]]  # cuDNN's has a last dim of 1
    return out.transpose(1, 2), lse.transpose(1, 2)


def flash_attention_lse() -> AttentionLse:
    """flash-attn's kernel: version 4, 3 or 2, the newest that is installed. For float16 and bfloat16 on CUDA.

    Raises ConfigError when none can be imported.
    """
    for module, arguments in (
        ("flash_attn.cute", {"return_lse": True}),
        ("flash_attn_interface", {"return_attn_probs": True}),
        ("flash_attn", {"return_attn_probs": True}),
    ):
        try:
            function = importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError):
            continue
        return _flash(function, arguments)
    raise ConfigError(
        "--attention-backend fa needs flash-attn, which is not installed; "
        "pip install 'safelight[flash]' or use --attention-backend auto",
        param="attention_backend",
    )


def _flash(function: Callable[..., Any], arguments: dict[str, bool]) -> AttentionLse:
    def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if q.dtype not in _HALF or q.numel() == 0 or k.numel() == 0:
            return attention_lse(q, k, v)
        out, lse = function(q, k, v, **arguments)[:2]  # (B, S, H, D) and (B, H, S)
        return out, lse.transpose(1, 2)

    return flash
