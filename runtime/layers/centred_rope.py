"""Rotary positions of Qwen-Image: text and pictures on one set of axes, every picture centred at zero.

A token has three positions: (picture, row, column). Rows and columns of a picture run from -(n - n // 2) to n // 2 - 1,
pictures are numbered from 0, and the j-th text token has m + j on all three axes, with m the half of the longest side
of any picture: the first position beyond them all. Follows diffusers' QwenEmbedRope, float32 angles included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safelight.runtime.layers.rope import Rotary

Grid = tuple[int, int]  # rows, columns of a picture's tokens


class CentredRope(nn.Module):
    """Tables of angles for positions -`reach` to `reach` - 1: cos, sin (2 reach, D/2), columns grouped by axis."""

    cos: Tensor
    sin: Tensor

    def __init__(self, axis_dims: tuple[int, int, int], reach: int = 4096, theta: float = 10000.0) -> None:
        super().__init__()
        positions = torch.arange(-reach, reach, dtype=torch.float32, device="cpu")
        powers = [torch.arange(0, d, 2, dtype=torch.float32, device="cpu") / d for d in axis_dims]
        angles = torch.cat([torch.outer(positions, 1.0 / torch.pow(theta, power)) for power in powers], dim=1)
        self.reach, self.pairs = reach, [d // 2 for d in axis_dims]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, grids: Sequence[Grid], text: int) -> tuple[Rotary, Rotary]:
        """Tables of `text` text tokens (T, D/2) and of all pictures' tokens (S, D/2), picture by picture.

        Raises ValueError when there are more positions than the tables have.
        """
        first = max(max(grid) // 2 for grid in grids)
        if first + text > self.reach:
            raise ValueError(
                f"{text} text tokens beside pictures of {list(grids)} tokens exceed {self.reach} positions"
            )
        start = self.reach + first
        texts = Rotary(self.cos[start : start + text], self.sin[start : start + text])
        images = (
            torch.cat([self._picture(table, n, g) for n, g in enumerate(grids)]) for table in (self.cos, self.sin)
        )
        return texts, Rotary(*images)

    def _picture(self, table: Tensor, number: int, grid: Grid) -> Tensor:
        """(rows * columns, D/2)"""
        pictures, rows, columns = torch.split(table, self.pairs, dim=1)
        parts = (
            pictures[self.reach + number].view(1, 1, -1),
            self._centred(rows, grid[0]).unsqueeze(1),
            self._centred(columns, grid[1]).unsqueeze(0),
        )
        return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 1)

    def _centred(self, table: Tensor, count: int) -> Tensor:
        start = self.reach - (count - count // 2)
        return table[start : start + count]
