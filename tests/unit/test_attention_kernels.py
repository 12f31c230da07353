"""Attention with its log-sum-exp on the CPU, against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from safelight.kernels import fused_attention
from safelight.kernels.dispatch import reference_kernels, select_kernels
from safelight.kernels.reference.attention import attention_lse
from safelight.runtime.errors import ConfigError

SHAPES = [(1, 7, 5, 3, 8), (2, 1, 33, 5, 12), (3, 4, 4, 1, 3), (1, 130, 70, 2, 64)]  # B, S, T, H, D


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_kernel_equals_the_definition(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    torch.set_num_threads(1)
    batch, queries, keys, heads, dim = shape
    q = torch.randn(batch, queries, heads, dim).to(dtype)
    k, v = torch.randn(2, batch, keys, heads, dim).to(dtype)
    kernels = reference_kernels()
    out, lse = kernels.attention_lse(q, k, v)
    expected, expected_lse = attention_lse(q, k, v)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5 if dtype == torch.float32 else 1e-4, rtol=0)
    torch.testing.assert_close(kernels.attention(q, k, v), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("shape", [(2, 3, 0, 2, 4), (2, 0, 3, 2, 4), (2, 3, 3, 0, 4)])
def test_empty_inputs_are_defined(shape: tuple[int, int, int, int, int]) -> None:
    batch, queries, keys, heads, dim = shape
    q, (k, v) = torch.randn(batch, queries, heads, dim), torch.randn(2, batch, keys, heads, dim)
    out, lse = reference_kernels().attention_lse(q, k, v)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full(q.shape[:3], -math.inf))
    if q.numel() == 0:
        assert torch.equal(reference_kernels().attention(q, k, v), q)


@pytest.mark.parametrize(
    ("keys", "dim", "dtype", "capability", "expected"),
    [
        (2, 128, torch.bfloat16, (9, 0), "cudnn"),
        (1, 128, torch.bfloat16, (9, 0), "flash"),  # cuDNN takes no single key
        (2, 128, torch.bfloat16, (8, 0), "flash"),
        (2, 160, torch.bfloat16, (9, 0), "flash"),
        (2, 128, torch.float16, (7, 5), "efficient"),
        (2, 128, torch.float32, (9, 0), "efficient"),
        (2, 12, torch.bfloat16, (9, 0), None),
    ],
)
def test_the_fastest_op_that_takes_the_inputs_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    keys: int, dim: int, dtype: torch.dtype, capability: tuple[int, int], expected: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(fused_attention, "_capability", lambda device: capability)
    with FakeTensorMode():
        q, k = (torch.empty(1, n, 2, dim, dtype=dtype, device="cuda") for n in (5, keys))
    assert fused_attention._op_name(q, k) == expected


def test_flash_attn_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match="fa runs on CUDA, the model is on cpu") as caught:
        select_kernels(torch.device("cpu"), "fa")
    assert caught.value.param == "attention_backend"


def test_flash_attn_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(ConfigError, match="needs flash-attn, which is not installed"):
        select_kernels(torch.device("cuda"), "fa")
