"""`--sp-impl yunchang`: refused without its packages; with them, flash-attn's type only, and ranks like ours."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from safelight.kernels.dispatch import reference_kernels
from safelight.runtime.errors import ConfigError
from safelight.runtime.parallel.sequence import SequenceGroups
from safelight.runtime.parallel.yunchang import yunchang_attention


def test_it_is_refused_without_its_packages() -> None:
    with pytest.raises(ConfigError, match=r"needs yunchang and flash-attn.*use --sp-impl native") as caught:
        yunchang_attention(2, 2, 0, 4)
    assert caught.value.param == "sp_impl"


def test_it_gets_the_degrees_and_flash_attns_type(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Any] = []

    def long_context_attention(**arguments: Any) -> Any:
        calls.append(arguments)
        return lambda q, k, v: q + k + v

    package = SimpleNamespace(
        set_seq_parallel_pg=lambda *arguments: calls.append(arguments), LongContextAttention=long_context_attention
    )
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "yunchang", package)
    kernels = SimpleNamespace(AttnType=SimpleNamespace(FA="flash"))
    monkeypatch.setitem(sys.modules, "yunchang.kernels", kernels)
    groups = SequenceGroups(None, None, yunchang_attention(4, 2, 5, 8))
    assert calls == [
        (4, 2, 5, 8),
        {"scatter_idx": 2, "gather_idx": 1, "ring_impl_type": "basic", "attn_type": "flash"},
    ]
    assert "run without yunchang" in caplog.text
    q: Tensor = torch.ones(1, 4, 2, 3)
    assert torch.equal(groups.attention(q, q, q, 4, reference_kernels()), 3 * q)
