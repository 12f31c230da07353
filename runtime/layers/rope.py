"""Rotary positions over (frame, row, column): one table per axis, combined per shape."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from safelight.runtime.parallel.joint import JointShare


class Rotary(NamedTuple):
    """Cosines and sines of every token's angles, float32 (S, D/2)."""

    cos: Tensor
    sin: Tensor


def joint_rotary(text: Rotary, image: Rotary, share: JointShare) -> Rotary:
    """Whole tables of text (T, D/2) and of image tokens (S, D/2) -> (t + s, D/2), this rank's, text first."""
    return Rotary(*(torch.cat(share.shard(*tables, dim=0)) for tables in zip(text, image, strict=True)))


class Rope3D(nn.Module):
    """Angles pos * theta^(-2i/d) for the three axes, whose shares d of the head dim are `axis_dims`.

    Tables are computed in float64 and kept in float32: angles: cos, sin (max_length, D/2), columns grouped by axis.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, axis_dims: tuple[int, int, int], max_length: int, theta: float = 10000.0) -> None:
        super().__init__()
        positions = torch.arange(max_length, dtype=torch.float64, device="cpu")
        angles = torch.cat(
            [
                torch.outer(positions, theta ** -(torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d))
                for d in axis_dims
            ],
            dim=1,
        )
        self.max_length = max_length
        self.pairs = [d // 2 for d in axis_dims]
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, grid: tuple[int, int, int]) -> Rotary:
        """The table of a token grid (frames, rows, columns), tokens in that order of significance.

        Raises ValueError when an axis is longer than the tables.
        """
        if max(grid) > self.max_length:
            raise ValueError(f"token grid {grid} exceeds {self.max_length} positions along an axis")
        return Rotary(self._expand(self.cos, grid), self._expand(self.sin, grid))

    def _expand(self, table: Tensor, grid: tuple[int, int, int]) -> Tensor:
        parts = []
        for axis, columns in enumerate(torch.split(table, self.pairs, dim=1)):
            view = [1, 1, 1, columns.shape[1]]
            view[axis] = grid[axis]
            parts.append(columns[: grid[axis]].view(view).expand(*grid, -1))
        return torch.cat(parts, dim=-1).flatten(0, 2)
