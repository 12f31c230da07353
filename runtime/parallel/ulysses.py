"""Ulysses sequence parallelism (arXiv 2309.14509) with uneven shares: tokens and heads need not divide by the ranks.

Rank r of u holds tokens [sum(sizes[:r]), sum(sizes[:r+1])) outside attention and the heads likewise inside it, where
sizes = split_sizes(total, u). A rank may hold none. `group` None means one rank: every function is the identity.
Exact: elements only move. Works on gloo and NCCL. Every rank of the group must make the same calls.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor


def split_sizes(total: int, parts: int) -> list[int]:
    """Shares of `total` that differ by at most one, larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def offsets(sizes: list[int]) -> list[int]:
    """Where each share begins, and the end of the last."""
    return [0, *accumulate(sizes)]


def shard_tokens(x: Tensor, *, dim: int = 1, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's share of a whole tensor along `dim`: (B, S, ...) -> (B, S/u, ...). Inverse: `gather_tokens`."""
    if group is None:
        return x
    sizes, rank = split_sizes(x.shape[dim], dist.get_world_size(group)), dist.get_rank(group)
    return x.narrow(dim, offsets(sizes)[rank], sizes[rank])


def gather_tokens(x: Tensor, length: int, *, group: dist.ProcessGroup | None) -> Tensor:
    """Whole tensor from the ranks' shares: (B, S/u, ...) -> (B, S, ...), S = `length`. Inverse: `shard_tokens`.

    Sent as an all-to-all of equal messages, because an all-gather would need shares of one length.
    """
    if group is None:
        return x
    world, rest = dist.get_world_size(group), x.shape[2:]
    sizes = split_sizes(length, world)
    row = x.shape[0] * rest.numel()
    incoming = [row * n for n in sizes]
    received = _exchange(x.reshape(-1).repeat(world), [x.numel()] * world, incoming, group)
    parts = zip(torch.split(received, incoming), sizes, strict=True)
    return torch.cat([p.view(x.shape[0], n, *rest) for p, n in parts], dim=1)


def tokens_to_heads(tensors: tuple[Tensor, ...], length: int, *, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Each (B, S/u, H, D) -> (B, S, H/u, D), S = `length`, in one all-to-all. Inverse: `heads_to_tokens`.

    Messages have tokens outermost, so that what comes is not copied: the results are views with dense last two dims.
    """
    if group is None:
        return tensors
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, share, heads, dim = tensors[0].shape
    tokens, head_sizes = split_sizes(length, world), split_sizes(heads, world)
    if share != tokens[rank]:
        raise ValueError(f"rank {rank} holds {share} tokens, its share of {length} is {tokens[rank]}")
    per_head, mine = len(tensors) * batch * dim, head_sizes[rank]
    outgoing = [per_head * share * n for n in head_sizes]
    send = tensors[0].new_empty(sum(outgoing))
    if heads % world == 0:
        packed, *wide = _words(send.view(world, share, batch, len(tensors), mine, dim), *tensors)
        for i, t in enumerate(wide):
            packed[:, :, :, i] = torch.unflatten(t, 2, (world, mine)).permute(2, 1, 0, 3, 4)
    else:
        for block, (a, b) in zip(torch.split(send, outgoing), pairwise(offsets(head_sizes)), strict=True):
            for i, t in enumerate(tensors):
                block.view(share, batch, len(tensors), b - a, dim)[:, :, i] = t[:, :, a:b].transpose(0, 1)
    received = _exchange(send, outgoing, [per_head * n * mine for n in tokens], group)
    return tuple(t.transpose(0, 1) for t in received.view(length, batch, len(tensors), mine, dim).unbind(2))


def heads_to_tokens(x: Tensor, heads: int, *, group: dist.ProcessGroup | None) -> Tensor:
    """(B, S, H/u, D) -> (B, S/u, H, D), H = `heads`, in one all-to-all. Inverse: `tokens_to_heads`.

    `x` with tokens outermost in memory, as attention leaves what `tokens_to_heads` gave it, is sent without a copy.
    """
    if group is None:
        return x
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, length, mine, dim = x.shape
    tokens, head_sizes = split_sizes(length, world), split_sizes(heads, world)
    share = tokens[rank]
    outgoing, incoming = ([batch * dim * n * mine for n in tokens], [batch * dim * share * n for n in head_sizes])
    received = _exchange(x.transpose(0, 1).contiguous().view(-1), outgoing, incoming, group)
    out = x.new_empty(batch, share, heads, dim)
    if heads % world == 0:
        parts, whole = _words(received.view(world, share, batch, mine, dim), out)
        torch.unflatten(whole, 2, (world, mine)).copy_(parts.permute(2, 1, 0, 3, 4))
    else:
        for part, (a, b) in zip(torch.split(received, incoming), pairwise(offsets(head_sizes)), strict=True):
            out[:, :, a:b] = part.view(share, batch, b - a, dim).transpose(0, 1)
    return out


def _words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory in elements of 8 bytes if all of it fits: a GPU copies strided tensors element by element."""
    fits = all(_fits_words(t) for t in tensors)
    return tuple(t.view(torch.int64) for t in tensors) if fits else tensors


def _fits_words(x: Tensor) -> bool:
    places = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and all(n * x.element_size() % 8 == 0 for n in places)


def _exchange(send: Tensor, outgoing: list[int], incoming: list[int], group: dist.ProcessGroup) -> Tensor:
    """Flat all-to-all: block r of `send` goes to rank r; returns the blocks that came, in order of rank."""
    received = send.new_empty(sum(incoming))
    dist.all_to_all_single(received, send, incoming, outgoing, group=group)
    return received
