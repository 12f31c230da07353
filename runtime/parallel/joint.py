"""Text and image tokens of one joint attention (FLUX, Qwen-Image), cut over a mesh as one sequence, text first.

Rank r of sp holds its share of the T + S tokens: the first ranks text, then image, one of them usually both. Shares
differ by at most one token whatever T and S are, so every rank does the same work in the layers that have a weight
for each kind of token, and none computes what another does. Text kept whole on every rank would cost T rows of every
linear layer on each of them, and an all-gather of its heads after each attention (docs/parallelism.md).

Joint attention is self-attention over the whole sequence, so `SequenceGroups.attention` serves it unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from safelight.runtime.parallel.sequence import SequenceGroups
from safelight.runtime.parallel.ulysses import split_sizes


@dataclass(frozen=True, slots=True)
class JointShare:
    """Which of `text` text tokens and `image` image tokens this rank holds: the first `own_text` of its share are text.

    All samples of a forward have T text tokens; states whose texts differ in length run in forwards of their own
    (`pipelines/grouping.py`).
    """

    groups: SequenceGroups
    text: int
    image: int
    start: int
    size: int

    @staticmethod
    def of(groups: SequenceGroups, text: int, image: int) -> JointShare:
        start, size = 0, text + image
        for group in (groups.ring, groups.ulysses):
            if group is not None:
                sizes, rank = split_sizes(size, dist.get_world_size(group)), dist.get_rank(group)
                start, size = start + sum(sizes[:rank]), sizes[rank]
        return JointShare(groups, text, image, start, size)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.text + self.image

    @property
    def own_text(self) -> int:
        return max(0, min(self.size, self.text - self.start))

    def shard(self, text: Tensor, image: Tensor, *, dim: int = 1) -> tuple[Tensor, Tensor]:
        """(B, T, ...), (B, S, ...) -> this rank's (B, t, ...), (B, s, ...), along `dim`. Either may be empty.
        Inverse: `gather`."""
        first = max(0, self.start - self.text)
        own_image = self.size - self.own_text
        return text.narrow(dim, min(self.start, self.text), self.own_text), image.narrow(dim, first, own_image)

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """(B, t + s, ...) of this rank -> its text and its image tokens. Inverse: `torch.cat` along dim 1."""
        return joint[:, : self.own_text], joint[:, self.own_text :]

    def gather(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's (B, t + s, ...) -> (B, T, ...) and (B, S, ...) on every rank. Inverse: `shard`, joined."""
        whole = self.groups.gather(joint, self.length)
        return whole[:, : self.text], whole[:, self.text :]

    def gather_image(self, image: Tensor) -> Tensor:
        """This rank's (B, s, ...) -> (B, S, ...) on every rank, for a prediction of image tokens only (rows of text are
        sent as zeros: they are few, and narrow after the last projection)."""
        rows = image.new_zeros((image.shape[0], self.own_text, *image.shape[2:]))
        return self.gather(torch.cat([rows, image], dim=1))[1]
