"""Row kernels: one program per token, the whole width in registers, one read and one write of memory.

Contracts are in `kernels/dispatch.py`. Widths up to 16,384; rows are read with their stride, so slices of a fused
projection need no copy. Arithmetic is float32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from safelight.kernels.reference import ops as reference


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _layer_norm(x, scale, shift, out, tokens, width, x_row, by_batch, by_token, eps,  # type: ignore[no-untyped-def]
                ONE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / width + eps)
    place = (row // tokens) * by_batch + (row % tokens) * by_token + columns
    factor = tl.load(scale + place, mask=inside, other=0.0).to(tl.float32) + ONE
    offset = tl.load(shift + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (normed * factor + offset).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rms_norm(x, weight, cos, sin, out, tokens, width, x_row, pairs, eps,  # type: ignore[no-untyped-def]
              ROTATE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    values = values * tl.rsqrt(tl.sum(values * values) / width + eps) * factor
    if ROTATE:
        even, odd = tl.split(tl.reshape(values, (BLOCK // 2, 2)))
        pair = tl.arange(0, BLOCK // 2)
        place = (row % tokens) * pairs + pair % pairs
        c = tl.load(cos + place)
        s = tl.load(sin + place)
        values = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK,))
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rms_norm_rope_heads(x, weight, cos, sin, out, tokens, width, x_row, out_batch, out_row, eps,  # type: ignore[no-untyped-def]
                         DIM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    heads = tl.reshape(values, (BLOCK // DIM, DIM))
    scale = tl.rsqrt(tl.sum(heads * heads, axis=1) / DIM + eps)
    normed = heads * scale[:, None] * tl.load(weight + tl.arange(0, DIM)).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(normed, (BLOCK // DIM, DIM // 2, 2)))
    place = (row % tokens) * (DIM // 2) + tl.arange(0, DIM // 2)
    c = tl.load(cos + place)[None, :]
    s = tl.load(sin + place)[None, :]
    rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK,))
    to = out + (row // tokens) * out_batch + (row % tokens) * out_row
    tl.store(to + columns, rotated.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gelu(x, out, tokens, width, x_batch, x_row, out_batch, out_row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    item, token = row // tokens, row % tokens
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    v = tl.load(x + item * x_batch + token * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    y = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))  # 2 sqrt(2 / pi); tanh u = 2 sigmoid(2 u) - 1
    tl.store(out + item * out_batch + token * out_row + columns, y.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gated_residual(x, y, gate, out, tokens, width, x_row, y_row, by_batch, by_token,  # type: ignore[no-untyped-def]
                    BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = (row // tokens) * by_batch + (row % tokens) * by_token + columns
    base = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(y + row * y_row + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + place, mask=inside, other=0.0)
    tl.store(out + row * width + columns, (base + added * factor).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = _rows(x)
    return _launch_rms(x, weight, weight, weight, eps, rotate=False)


def rms_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return _launch_rms(_rows(x), weight, cos.contiguous(), sin.contiguous(), eps, rotate=True)


def rms_norm_rope_heads(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    dim = weight.numel()
    if dim & (dim - 1):
        return reference.rms_norm_rope_heads(x, weight, cos, sin, eps, out)  # heads are taken apart in powers of two
    x = _rows(x)
    batch, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _rms_norm_rope_heads[(batch * tokens,)](
        x,
        weight,
        cos.contiguous(),
        sin.contiguous(),
        out,
        tokens,
        width,
        x.stride(1),
        out.stride(0),
        out.stride(1),
        eps,
        DIM=dim,
        BLOCK=_block(width),
    )
    return out


def gelu(x: Tensor, out: Tensor | None = None) -> Tensor:
    batch, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    block = min(_block(width), 4096)
    _gelu[(batch * tokens, -(-width // block))](
        x, out, tokens, width, x.stride(0), x.stride(1), out.stride(0), out.stride(1), BLOCK=block
    )
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _launch_layer_norm(x, weight, bias, (0, 0), eps, one=0.0)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    scale, shift = _alike(scale, shift)
    return _launch_layer_norm(x, scale, shift, _modulation_strides(scale), eps, one=1.0)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    x, y = _rows(x), _rows(y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, tokens, width = x.shape
    gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    _gated_residual[(batch * tokens,)](
        x, y, gate, out, tokens, width, x.stride(1), y.stride(1), *_modulation_strides(gate), BLOCK=_block(width)
    )
    return out


def _launch_rms(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, rotate: bool) -> Tensor:
    batch, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm[(batch * tokens,)](
        x, weight, cos, sin, out, tokens, width, x.stride(1), cos.shape[-1], eps, ROTATE=rotate, BLOCK=_block(width)
    )
    return out


def _launch_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, strides: tuple[int, int], eps: float, *, one: float
) -> Tensor:
    x = _rows(x)
    batch, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _layer_norm[(batch * tokens,)](
        x, scale, shift, out, tokens, width, x.stride(1), *strides, eps, ONE=one, BLOCK=_block(width)
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """x itself when its rows lie at one stride over batch and tokens, else a contiguous copy."""
    dense = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if dense else x.contiguous()


def _alike(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same strides and a dense last dim."""
    if scale.stride() == shift.stride() and scale.stride(-1) == 1:
        return scale, shift
    return scale.contiguous(), shift.contiguous()


def _modulation_strides(modulation: Tensor) -> tuple[int, int]:
    """(between batch items, between tokens) of a (B, N, E) modulation: N = 1 is shared by all tokens."""
    return modulation.stride(0), 0 if modulation.shape[1] == 1 else modulation.stride(1)


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()
