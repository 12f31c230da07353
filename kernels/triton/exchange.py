"""The two exchanges of Ulysses as stores into the memory of the peers: one kernel each, no packing, nothing to unpack.

Every rank has a window of memory that the others can write to; `places` are the addresses of all ranks' windows, int64
on the device. A kernel ends when its own stores are done; the ranks then meet at a barrier (parallel/peer_window.py).
Shares of tokens and heads follow `parallel.ulysses.split_sizes`: larger ones first. No rank's share may be empty.
"""

from __future__ import annotations

from torch import Tensor

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _push_heads(q, k, v, places, length, first, q_batch, q_row, k_batch, k_row, v_batch, v_row,  # type: ignore[no-untyped-def]
                WORLD: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VECTOR: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    token, sample, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    samples = tl.num_programs(1)
    if which == 0:
        row = q + sample * q_batch + token * q_row
    elif which == 1:
        row = k + sample * k_batch + token * k_row
    else:
        row = v + sample * v_batch + token * v_row
    row = tl.multiple_of(row, 2 * VECTOR)
    columns = tl.arange(0, BLOCK)
    for peer in tl.static_range(WORLD):
        begin = (peer * (HEADS // WORLD) + (peer if peer < HEADS % WORLD else HEADS % WORLD)) * DIM
        size = (HEADS // WORLD + (1 if peer < HEADS % WORLD else 0)) * DIM
        inside = columns < size
        values = tl.load(row + begin + columns, mask=inside)
        window = tl.multiple_of(tl.load(places + peer).to(tl.pointer_type(q.dtype.element_ty)), 16)
        place = ((which * samples + sample) * length + first + token) * size
        tl.store(window + tl.multiple_of(place, VECTOR) + columns, values, mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _push_tokens(x, places, x_batch, x_row, first, width,  # type: ignore[no-untyped-def]
                 WORLD: tl.constexpr, MINE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.num_programs(0)
    smaller, larger = length // WORLD, length % WORLD  # that many shares have a token more
    border = larger * (smaller + 1)
    beyond = token >= border
    peer = tl.where(beyond, larger + (token - border) // smaller, token // (smaller + 1))
    share = tl.where(beyond, smaller, smaller + 1)
    local = tl.where(beyond, (token - border) % smaller, token % (smaller + 1))
    columns = tl.arange(0, BLOCK)
    inside = columns < MINE
    row = tl.multiple_of(x + sample * x_batch + token * x_row, 2 * VECTOR)
    values = tl.load(row + columns, mask=inside)
    window = tl.multiple_of(tl.load(places + peer).to(tl.pointer_type(x.dtype.element_ty)), 16)
    place = (sample * share + local) * width + first
    tl.store(window + tl.multiple_of(place, VECTOR) + columns, values, mask=inside)


def push_heads(q: Tensor, k: Tensor, v: Tensor, places: Tensor, length: int, first: int) -> None:
    """q, k, v: (B, s, H, D), tokens `first` to `first` + s of `length`, last two dims dense -> into the window of every
    peer its heads, (3, B, length, h, D) there."""
    batch, share, heads, dim = q.shape
    world = places.numel()
    strides = [n for t in (q, k, v) for n in t.stride()[:2]]
    block = triton.next_power_of_2(-(-heads // world) * dim)
    _push_heads[(share, batch, 3)](
        q, k, v, places, length, first, *strides, WORLD=world, HEADS=heads, DIM=dim,
        VECTOR=_vector(dim, *(q, k, v)), BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def push_tokens(x: Tensor, places: Tensor, heads: int, first: int) -> None:
    """x: (B, S, h, D), heads `first` to `first` + h of `heads`, last two dims dense -> into the window of every peer
    its tokens' places, (B, s, H, D) there."""
    batch, length, mine, dim = x.shape
    block = triton.next_power_of_2(mine * dim)
    _push_tokens[(length, batch)](
        x, places, *x.stride()[:2], first * dim, heads * dim, WORLD=places.numel(), MINE=mine * dim,
        VECTOR=_vector(dim, x), BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def _vector(dim: int, *tensors: Tensor) -> int:
    """Elements that may be moved at once: 8 where rows begin at multiples of 16 bytes, of two-byte elements."""
    whole = all(
        t.element_size() == 2 and t.data_ptr() % 16 == 0 and all(n % 8 == 0 for n in t.stride()[:2]) for t in tensors
    )
    return 8 if whole and dim % 8 == 0 else 1


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))
