"""The token axis over a mesh: cut into one chunk per ring rank, every chunk into one share per Ulysses rank.

No share differs from another by more than one token. With one rank every function is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from safelight.kernels.dispatch import KernelSet
from safelight.runtime.parallel.mesh import Axis, ParallelMesh
from safelight.runtime.parallel.peer_window import PeerWindow
from safelight.runtime.parallel.ring import ring_attention
from safelight.runtime.parallel.ulysses import (
    gather_tokens,
    heads_to_tokens,
    shard_tokens,
    split_sizes,
    tokens_to_heads,
)


@dataclass(frozen=True, slots=True)
class SequenceGroups:
    """The two groups that share one sequence; None where the degree is 1.

    `even_attention` replaces `attention` where shares are equal (`--sp-impl yunchang`). `window`: of the Ulysses group,
    where its GPUs reach each other's memory.
    """

    ring: dist.ProcessGroup | None
    ulysses: dist.ProcessGroup | None
    even_attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    window: PeerWindow | None = None

    @staticmethod
    def of(mesh: ParallelMesh) -> SequenceGroups:
        return SequenceGroups(mesh.group(Axis.RING), mesh.group(Axis.ULYSSES), mesh.even_attention, mesh.window)

    @property
    def alone(self) -> bool:
        return self.ring is None and self.ulysses is None

    def chunks(self, length: int) -> list[int]:
        """Tokens of each ring rank's chunk, out of `length`."""
        return [length] if self.ring is None else split_sizes(length, dist.get_world_size(self.ring))

    def shard(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """(B, S, ...) -> this rank's (B, S/sp, ...), along `dim`. Inverse: `gather`."""
        return shard_tokens(shard_tokens(x, dim=dim, group=self.ring), dim=dim, group=self.ulysses)

    def gather(self, x: Tensor, length: int) -> Tensor:
        """(B, S/sp, ...) -> (B, S, ...) on every rank, S = `length`. Inverse: `shard`."""
        return gather_tokens(gather_tokens(x, self._chunk(length), group=self.ulysses), length, group=self.ring)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, length: int, kernels: KernelSet) -> Tensor:
        """q, k, v: (B, S/sp, H, D) -> (B, S/sp, H, D), attending over all S = `length` tokens.

        Unified sequence parallelism (arXiv 2405.07719): Ulysses makes a rank's share of the heads whole over its ring
        chunk, the ring lets it attend to the other chunks.
        """
        heads = q.shape[2]
        if self.even_attention is not None and self._even(length, heads):
            return self.even_attention(q, k, v)
        chunk, window = self._chunk(length), self.window
        if window is not None and not window.fits(q.shape[0], chunk, heads, q.shape[3], q.element_size()):
            window = None
        if window is None:
            q, k, v = tokens_to_heads((q, k, v), chunk, group=self.ulysses)
        else:
            q, k, v = window.tokens_to_heads(q, k, v, chunk)
        if self.ring is None:
            out = kernels.attention(q, k, v)
        else:
            out = ring_attention(q, k, v, self.chunks(length), kernels.attention_lse, group=self.ring)
        if window is None:
            return heads_to_tokens(out, heads, group=self.ulysses)
        return window.heads_to_tokens(out, heads)

    def _even(self, length: int, heads: int) -> bool:
        ring, ulysses = (1 if g is None else dist.get_world_size(g) for g in (self.ring, self.ulysses))
        return length % (ring * ulysses) == 0 and heads % ulysses == 0

    def _chunk(self, length: int) -> int:
        return self.chunks(length)[0 if self.ring is None else dist.get_rank(self.ring)]
