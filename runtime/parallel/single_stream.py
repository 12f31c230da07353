"""Image and text tokens of one sequence whose image tokens first pass through layers of their own (Z-Image).

A rank holds its share of the image tokens, as those layers cut them, and then so much of the text that its share of the
whole sequence is the one that `SequenceGroups.attention` expects. Attention does not ask for the order of tokens as
long as each keeps its position, so nothing moves between ranks where the two kinds of tokens meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from safelight.runtime.parallel.sequence import SequenceGroups
from safelight.runtime.parallel.ulysses import split_sizes


def rank_sizes(total: int, ring: int, ulysses: int) -> list[int]:
    """Every rank's share of `total` tokens, Ulysses innermost."""
    return [size for chunk in split_sizes(total, ring) for size in split_sizes(chunk, ulysses)]


@dataclass(frozen=True, slots=True)
class TokenShare:
    """This rank's [start, start + size) of `image` and of `text` tokens."""

    image: int
    text: int
    image_start: int
    image_size: int
    text_start: int
    text_size: int

    @staticmethod
    def of(groups: SequenceGroups, image: int, text: int) -> TokenShare:
        """Of this rank. Shares of more tokens are nowhere smaller, so no rank's share of the text is negative."""
        ring, ulysses = (1 if g is None else dist.get_world_size(g) for g in (groups.ring, groups.ulysses))
        row, column = (0 if g is None else dist.get_rank(g) for g in (groups.ring, groups.ulysses))
        return TokenShare.at(row * ulysses + column, ring, ulysses, image, text)

    @staticmethod
    def at(rank: int, ring: int, ulysses: int, image: int, text: int) -> TokenShare:
        """As `of`, for any rank of ring x ulysses."""
        images, wholes = (rank_sizes(total, ring, ulysses) for total in (image, image + text))
        texts = [whole - part for whole, part in zip(wholes, images, strict=True)]
        return TokenShare(
            image, text, sum(images[:rank]), images[rank], sum(texts[:rank]), texts[rank]
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.image + self.text

    def of_image(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """(B, image, ...) -> this rank's part. Inverse: `SequenceGroups.gather`."""
        return x.narrow(dim, self.image_start, self.image_size)

    def of_text(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """(B, text, ...) -> this rank's part, which may be empty."""
        return x.narrow(dim, self.text_start, self.text_size)
