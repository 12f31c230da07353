"""The ops that models call, and who chooses their implementation.

A `KernelSet` is chosen once, when a model is built (`select_kernels`), and handed to its layers; nothing is global.
All sets have these signatures; shapes use B batch, S sequence, T keys, H heads, D head dim, E = H * D width. Inputs
may be float32, bfloat16 or float16; arithmetic inside one op is float32 (attention: as the backend does it), and the
result is rounded once to the dtype of the first argument.

attention(q, k, v)                      q: (B, S, H, D), k, v: (B, T, H, D) -> (B, S, H, D); full, unmasked softmax with
                                        scale D^-0.5; any strides with a dense last dim; H may be 0 (empty result).
attention_lse(q, k, v)                  the same, and the log of each row's sum of exponentials: (B, S, H) float32,
                                        natural logarithm of the scaled scores. T may be 0: zeros and -inf. Two
                                        results over different keys merge exactly (parallel/ring.py).
rms_norm(x, weight, eps)                x: (B, S, E), weight: (E,) -> (B, S, E), over the whole width.
rms_norm_rope(x, weight, cos, sin, eps) the same, then neighbouring pairs (2i, 2i+1) of every head rotated by the
                                        angle in cos, sin: (S, D/2) float32 (Su et al., arXiv 2104.09864).
rms_norm_rope_heads(x, weight, cos, sin, eps, out=None)  weight: (D,): the norm of every head of x by itself, over its
                                        D, then rotated as above.
gelu(x, out=None)                       x: (B, S, E), tanh-approximated (Hendrycks and Gimpel, arXiv 1606.08415).
linear_gelu(x, weight, bias)            gelu of x weight^T + bias; x: (..., E), weight: (F, E), bias: (F,).
layer_norm(x, weight, bias, eps)        x: (B, S, E), weight, bias: (E,) float32.
layer_norm_modulate(x, scale, shift, eps)  layer norm without weights, then * (1 + scale) + shift with scale, shift:
                                        (B, N, E) float32, N = 1 or S, dense last dim (adaLN, arXiv 2212.09748).
gated_residual(x, y, gate)              x + y * gate; x, y: (B, S, E), gate: (B, N, E) float32 as above.

Rows of x may be strided (a slice of a fused projection) as long as the last dim is dense. Results are contiguous,
except attention's, whose strides are the backend's, and those written to `out`, which has x's shape and dtype and a
dense last dim, and is returned. Triton agrees with the reference to 1 ulp of the output dtype
for elements of order one (tests/gpu).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safelight.kernels import fused_attention, fused_linear
from safelight.kernels.reference import ops as reference
from safelight.runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KernelSet:
    """One implementation of every op above."""

    name: str
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention_lse: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rms_norm_rope: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    rms_norm_rope_heads: Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
    gelu: Callable[[Tensor, Tensor | None], Tensor]
    linear_gelu: Callable[[Tensor, Tensor, Tensor], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    layer_norm_modulate: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    gated_residual: Callable[[Tensor, Tensor, Tensor], Tensor]


def reference_kernels() -> KernelSet:
    """Plain torch: any device, any dtype."""
    return KernelSet(
        "reference",
        reference.attention,
        fused_attention.attention_lse,
        reference.rms_norm,
        reference.rms_norm_rope,
        reference.rms_norm_rope_heads,
        reference.gelu,
        reference.linear_gelu,
        reference.layer_norm,
        reference.layer_norm_modulate,
        reference.gated_residual,
    )


def triton_kernels() -> KernelSet:
    """Fused kernels for CUDA; raises ImportError where triton is not installed."""
    from safelight.kernels.triton import rows

    return KernelSet(
        "triton",
        reference.attention,  # torch's own choice takes cuDNN on Hopper: 570-620 TFLOP/s there
        fused_attention.attention_lse,
        rows.rms_norm,
        rows.rms_norm_rope,
        rows.rms_norm_rope_heads,
        rows.gelu,
        fused_linear.linear_gelu,
        rows.layer_norm,
        rows.layer_norm_modulate,
        rows.gated_residual,
    )


def select_kernels(device: torch.device, attention: str = "auto") -> KernelSet:
    """The fastest set for a device: fused on CUDA, also in compiled blocks, plain torch elsewhere.

    `attention`: `auto` and `torch_sdpa` are torch's kernels, `fa` flash-attn's. CUDA without triton (it comes with
    torch's CUDA wheels on Linux) is served by plain torch, with a warning. Raises ConfigError: `fa` cannot be had.
    """
    kernels = _device_kernels(device)
    if attention != "fa":
        return kernels
    if device.type != "cuda":
        raise ConfigError(
            f"--attention-backend fa runs on CUDA, the model is on {device.type}; use --attention-backend auto",
            param="attention_backend",
        )
    flash = fused_attention.flash_attention_lse()
    return replace(kernels, attention=lambda q, k, v: flash(q, k, v)[0], attention_lse=flash)


def _device_kernels(device: torch.device) -> KernelSet:
    if device.type != "cuda":
        return reference_kernels()
    try:
        return triton_kernels()
    except ImportError as error:
        logging.getLogger(__name__).warning("no fused kernels, forwards take a third longer: %s", error)
        return reference_kernels()
