"""On a CUDA device: attention with its log-sum-exp from every kernel, against the definition, and merged from parts."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from safelight.kernels.dispatch import select_kernels
from safelight.kernels.fused_attention import aten_attention_lse, flash_attention_lse
from safelight.kernels.reference.attention import attention_lse as definition
from safelight.runtime.parallel.ring import merge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(1, 128, 128, 2, 128), (2, 333, 77, 3, 128), (1, 1, 1000, 5, 64), (3, 40, 1, 1, 96)]  # B, S, T, H, D
OPS = [
    ("cudnn", torch.bfloat16, 0.02), ("cudnn", torch.float16, 0.004), ("flash", torch.bfloat16, 0.02),
    ("flash", torch.float16, 0.004), ("efficient", torch.bfloat16, 0.02), ("efficient", torch.float32, 2e-3),
]  # fmt: skip


def inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """k and v are slices of a wider tensor, as after a fused projection."""
    torch.manual_seed(0)
    batch, queries, keys, heads, dim = shape
    q = torch.randn(batch, queries, heads, dim, device="cuda").to(dtype)
    k, v = torch.randn(batch, keys, heads, 2 * dim, device="cuda").to(dtype).chunk(2, dim=-1)
    return q, k, v


def check(made: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    assert made[0].shape == expected[0].shape
    assert made[1].shape == expected[1].shape
    assert made[1].dtype == torch.float32
    torch.testing.assert_close(made[0].float(), expected[0].float(), atol=tolerance, rtol=0.01)
    torch.testing.assert_close(made[1], expected[1], atol=5e-3, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dtype", "tolerance"), OPS)
def test_each_op_of_torch_equals_the_definition(
    name: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int, int, int]
) -> None:
    if name == "cudnn" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN's attention is used from Hopper on")
    if name == "cudnn" and shape[2] == 1:
        pytest.skip("cuDNN's attention takes no single key")
    q, k, v = inputs(shape, dtype)
    check(aten_attention_lse(name, q, k, v), definition(q, k, v), tolerance)


@pytest.mark.parametrize("dim", [12, 64, 128, 160, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_chosen_takes_every_head_dim(dtype: torch.dtype, dim: int) -> None:
    q, k, v = inputs((2, 65, 130, 3, dim), dtype)
    check(select_kernels(q.device).attention_lse(q, k, v), definition(q, k, v), 0.02)


def test_what_is_chosen_takes_a_single_key() -> None:
    q, k, v = inputs((2, 65, 1, 3, 128), torch.bfloat16)
    check(select_kernels(q.device).attention_lse(q, k, v), definition(q, k, v), 0.02)


def test_what_is_chosen_takes_tokens_outermost() -> None:
    """As an all-to-all of Ulysses leaves them: (S, B, 3, H, D)."""
    torch.manual_seed(0)
    packed = torch.randn(300, 2, 3, 4, 128, device="cuda").to(torch.bfloat16)
    q, k, v = (t.transpose(0, 1) for t in packed.unbind(2))
    kernels, exact = select_kernels(q.device), definition(q, k, v)
    check(kernels.attention_lse(q, k, v), exact, 0.02)
    torch.testing.assert_close(kernels.attention(q, k, v).float(), exact[0].float(), atol=0.02, rtol=0.01)


def test_empty_inputs_are_defined() -> None:
    q, k, v = inputs((2, 5, 0, 3, 64), torch.bfloat16)
    out, lse = select_kernels(q.device).attention_lse(q, k, v)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full(q.shape[:3], -math.inf, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 9, 9, 0, 64), (2, 0, 3, 2, 128)])
def test_a_rank_without_heads_or_tokens_attends_to_nothing(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    q, k, v = inputs(shape, dtype)
    assert select_kernels(q.device).attention(q, k, v).shape == q.shape


def test_parts_merge_to_the_whole_as_exactly_as_the_kernel_is() -> None:
    q, k, v = inputs((1, 300, 500, 4, 128), torch.bfloat16)
    attention = select_kernels(q.device).attention_lse
    out, lse = torch.zeros_like(q, dtype=torch.float32), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    for keys, values in zip(torch.split(k, [170, 0, 330], dim=1), torch.split(v, [170, 0, 330], dim=1), strict=True):
        out, lse = merge(out, lse, *attention(q, keys, values))
    exact = definition(q.float(), k.float(), v.float())
    whole = attention(q, k, v)
    assert (out - exact[0]).norm() <= 2 * (whole[0].float() - exact[0]).norm()
    torch.testing.assert_close(lse, exact[1], atol=5e-3, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attn_equals_the_definition(shape: tuple[int, int, int, int, int]) -> None:
    q, k, v = inputs(shape, torch.bfloat16)
    check(flash_attention_lse()(q, k, v), definition(q, k, v), 0.02)
