"""adaLN modulation of all blocks (arXiv 2212.09748), apart from the blocks.

It depends on a step's time and on what goes for the whole picture, not on its tokens. So one product with each matrix
serves several steps of a schedule (`pipelines.ahead`): the matrices, a third of Qwen-Image's weights, are not read in
every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safelight.runtime.layers.linear import Adapters, Linear, adapters_of


class Modulation(nn.Module):
    """Shifts, scales and gates of all layers, `counts[i]` vectors of width E for layer i; M is their sum."""

    def __init__(self, width: int, counts: Sequence[int]) -> None:
        super().__init__()
        self.width, self.counts = width, tuple(counts)
        self.layers = nn.ModuleList(Linear(width, count * width) for count in self.counts)

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Of M E values for one time."""
        return sum(self.counts) * self.width * dtype.itemsize

    def forward(self, time: Tensor, adapters: Adapters | None = None) -> Tensor:
        """time: (B, N, E), activated -> (B, N, M, E) in its dtype."""
        made = [layer(time, adapters_of(adapters, f"layers.{index}")) for index, layer in enumerate(self.layers)]
        return torch.unflatten(torch.cat(made, dim=-1), 2, (-1, self.width))

    def split(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """(B, N, M, E) -> float32 (B, N, counts[i], E) of each layer."""
        return torch.split(modulation.float(), list(self.counts), dim=2)
