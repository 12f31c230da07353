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


def _offsets(sizes: list[int]) -> list[int]:
    return [0, *accumulate(sizes)]


def shard_tokens(x: Tensor, *, dim: int = 1, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's share of a whole tensor along `dim`: (B, S, ...) -> (B, S/u, ...). Inverse: `gather_tokens`."""
    if group is None:
        return x
    sizes, rank = split_sizes(x.shape[dim], dist.get_world_size(group)), dist.get_rank(group)
    return x.narrow(dim, _offsets(sizes)[rank], sizes[rank])


def gather_tokens(x: Tensor, length: int, *, group: dist.ProcessGroup | None) -> Tensor:
    """Whole tensor from the ranks' shares: (B, S/u, ...) -> (B, S, ...), S = `length`. Inverse: `shard_tokens`.

    Sent as an all-to-all of equal messages, because an all-gather would need shares of one length.
    """
    if group is None:
        return x
    world, rest = dist.get_world_size(group), x.shape[2:]
    sizes = split_sizes(length, world)
    row = x.shape[0] * rest.numel()
    received = _exchange(x.reshape(-1).repeat(world), [x.numel()] * world, [row * n for n in sizes], group)
    return torch.cat([p.view(x.shape[0], n, *rest) for p, n in zip(received, sizes, strict=True)], dim=1)


def tokens_to_heads(tensors: tuple[Tensor, ...], length: int, *, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Each (B, S/u, H, D) -> (B, S, H/u, D), S = `length`, in one all-to-all. Inverse: `heads_to_tokens`."""
    if group is None:
        return tensors
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, share, heads, dim = tensors[0].shape
    tokens, head_sizes = split_sizes(length, world), split_sizes(heads, world)
    if share != tokens[rank]:
        raise ValueError(f"rank {rank} holds {share} tokens, its share of {length} is {tokens[rank]}")
    starts = _offsets(head_sizes)
    per_head, mine = len(tensors) * batch * dim, head_sizes[rank]
    send = torch.cat([t[:, :, a:b].reshape(-1) for a, b in pairwise(starts) for t in tensors])
    received = _exchange(send, [per_head * share * n for n in head_sizes], [per_head * n * mine for n in tokens], group)
    parts = [p.view(len(tensors), batch, n, mine, dim) for p, n in zip(received, tokens, strict=True)]
    return torch.cat(parts, dim=2).unbind(0)


def heads_to_tokens(x: Tensor, heads: int, *, group: dist.ProcessGroup | None) -> Tensor:
    """(B, S, H/u, D) -> (B, S/u, H, D), H = `heads`, in one all-to-all. Inverse: `tokens_to_heads`."""
    if group is None:
        return x
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    batch, length, mine, dim = x.shape
    tokens, head_sizes = split_sizes(length, world), split_sizes(heads, world)
    starts, share = _offsets(tokens), tokens[rank]
    send = torch.cat([x[:, a:b].reshape(-1) for a, b in pairwise(starts)])
    received = _exchange(
        send, [batch * dim * n * mine for n in tokens], [batch * dim * share * n for n in head_sizes], group
    )
    parts = [p.view(batch, share, n, dim) for p, n in zip(received, head_sizes, strict=True)]
    return torch.cat(parts, dim=2)


def _exchange(send: Tensor, outgoing: list[int], incoming: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Flat all-to-all: block r of `send` goes to rank r; returns the blocks that came, by rank."""
    received = send.new_empty(sum(incoming))
    dist.all_to_all_single(received, send, incoming, outgoing, group=group)
    return list(torch.split(received, incoming))
