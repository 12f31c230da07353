"""Transformers whose forwards of different shapes can share one pass over the blocks.

Prompts of different lengths cannot share a forward without padding. But where blocks have to be brought to the device
first, each can compute for all of them before the next one comes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from safelight.runtime.layers.linear import Adapters, scoped
from safelight.runtime.layers.rope import Rotary

P = TypeVar("P")  # a forward under way: tokens between two blocks, and what goes for all blocks


class BlockPass(nn.Module, ABC, Generic[P]):
    """A network of one list of `blocks`, and what comes before and behind them."""

    blocks: nn.ModuleList

    @abstractmethod
    def begin(
        self, latents: Tensor, timestep: Tensor, conditioning: Any, rotary: Rotary | None, adapters: Adapters | None
    ) -> P:
        """A call's arguments -> what the first block gets."""

    @abstractmethod
    def advance(self, going: P, block: nn.Module, index: int, adapters: Adapters | None) -> None:
        """Runs block `index`, whose own adapters are given."""

    @abstractmethod
    def end(self, done: P, adapters: Adapters | None) -> Tensor:
        """The prediction, (B, C, F, h, w)."""

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Any,
        out: Tensor | None = None,
        *,
        rotary: Rotary | None = None,
        adapters: Adapters | None = None,
    ) -> Tensor:
        """latents: (B, C, F, h, w), timestep: (B,) -> the prediction in the latents' shape and dtype, written to `out`
        when given. `rotary`: of `rope`, when it was kept."""
        going = self.begin(latents, timestep, conditioning, rotary, adapters)
        self._through([going], adapters)
        prediction = self.end(going, adapters).to(latents.dtype)
        return prediction if out is None else out.copy_(prediction)

    def together(self, calls: Sequence[tuple[Tensor, Tensor, Any]]) -> list[Tensor]:
        """The predictions for the arguments of several calls, in one pass over the blocks."""
        going = [self.begin(*call, None, None) for call in calls]
        self._through(going, None)
        return [self.end(each, None).to(call[0].dtype) for each, call in zip(going, calls, strict=True)]

    def _through(self, going: Sequence[P], adapters: Adapters | None) -> None:
        for index, block in enumerate(self.blocks):
            own = scoped(adapters, f"blocks.{index}")
            for each in going:
                self.advance(each, block, index, own)
