"""Windows of peers' memory: what fits, who decides, and when Ulysses goes through messages. The exchange itself needs
GPUs: tests/gpu/test_exchange_gpu.py and test_sequence_gpu.py."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safelight.kernels.dispatch import reference_kernels
from safelight.runtime.parallel import sequence
from safelight.runtime.parallel.peer_window import PeerWindow, apart
from safelight.runtime.parallel.sequence import SequenceGroups
from safelight.runtime.parallel.ulysses import split_sizes


def window(size: int, world: int = 2, rank: int = 0) -> PeerWindow:
    places = torch.arange(world)
    return PeerWindow(torch.zeros(size, dtype=torch.uint8), places, places, rank, None)


@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(2, 4),
    st.integers(1, 12),
)  # fmt: skip
def test_what_fits_lies_within_its_part_on_every_rank(
    batch: int, length: int, heads: int, dim: int, world: int, kib: int
) -> None:
    size = 1024 * kib
    made = window(size, world)
    border, itemsize = size // 4 * 3, 4
    shares, own = split_sizes(length, world), split_sizes(heads, world)
    to_heads = max(3 * batch * length * h * dim * itemsize for h in own)
    to_tokens = max(batch * s * heads * dim * itemsize for s in shares)
    inside = to_heads <= border and to_tokens <= size - border
    fits = made.fits(batch, length, heads, dim, itemsize)
    assert inside or not fits
    assert fits or not inside or min(*shares, *own) == 0


def test_a_rank_without_heads_or_tokens_is_served_by_messages() -> None:
    made = window(1 << 20, world=4)
    assert made.fits(1, 4, 4, 8, 2)
    assert not made.fits(1, 3, 4, 8, 2)
    assert not made.fits(1, 4, 3, 8, 2)


class Recorded:
    """In the place of a window: says what was asked of it."""

    def __init__(self, *, fits: bool) -> None:
        self.asked: list[str] = []
        self._fits = fits

    def fits(self, *shape: int) -> bool:
        self.asked.append(f"fits {shape}")
        return self._fits

    def tokens_to_heads(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        self.asked.append(f"to heads {length}")
        return q, k, v

    def heads_to_tokens(self, x: Tensor, heads: int) -> Tensor:
        self.asked.append(f"to tokens {heads}")
        return x


@pytest.mark.parametrize("fits", [True, False])
def test_an_attention_goes_through_the_window_both_ways_or_not_at_all(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []

    def to_heads(tensors: tuple[Tensor, ...], length: int, *, group: Any) -> tuple[Tensor, ...]:
        messages.append(f"to heads {length}")
        return tensors

    def to_tokens(x: Tensor, heads: int, *, group: Any) -> Tensor:
        messages.append(f"to tokens {heads}")
        return x

    monkeypatch.setattr(sequence, "tokens_to_heads", to_heads)
    monkeypatch.setattr(sequence, "heads_to_tokens", to_tokens)
    made = Recorded(fits=fits)
    q, k, v = torch.randn(3, 2, 5, 4, 8)
    groups = SequenceGroups(None, None, window=cast(PeerWindow, made))
    out = groups.attention(q, k, v, 5, reference_kernels())
    torch.testing.assert_close(out, reference_kernels().attention(q, k, v))
    steps = ["to heads 5", "to tokens 4"]
    assert made.asked == ["fits (2, 5, 4, 8, 4)", *(steps if fits else [])]
    assert messages == ([] if fits else steps)


@pytest.mark.parametrize(
    ("hosts", "devices", "reason"),
    [
        ((1, 2), (0, 0), "several hosts"),
        ((1, 1, 2), (0, 1, 2), "several hosts"),
        ((1, 1), (0, 0), "each rank sees one device"),
        ((1, 1), (0, 1), ""),
        ((1, 1, 1), (2, 0, 1), ""),
    ],
)
def test_ranks_that_have_no_memory_in_common_are_told(
    hosts: tuple[int, ...], devices: tuple[int, ...], reason: str
) -> None:
    found = apart(hosts, devices)
    assert reason in found
    assert bool(found) == bool(reason)


def test_compiled_blocks_send_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    made = window(1 << 20)
    assert made.fits(1, 16, 4, 8, 2)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not made.fits(1, 16, 4, 8, 2)
