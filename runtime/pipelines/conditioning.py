"""What families' conditionings have alike: the two branches of guidance, and the ids that a request must bring."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from safelight.runtime.errors import InvalidRequest
from safelight.runtime.messages import GenerationRequest


class Conditioning(Protocol):
    """What a step reads of any family's conditioning."""

    @property
    def count(self) -> int:
        """Predictions of a step: 2 when it is guided, else 1."""

    def shapes(self, index: int) -> Hashable:
        """Of all tensors that a branch's forward reads: samples of other shapes need a forward of their own."""


@dataclass(frozen=True, slots=True)
class Branches:
    """Embedded text of the conditional and the unconditional branch; `negative` is None without guidance."""

    positive: Tensor
    negative: Tensor | None

    @property
    def count(self) -> int:
        return 1 if self.negative is None else 2

    def shapes(self, index: int) -> Hashable:
        return tuple(self.branch(index).shape)

    def branch(self, index: int) -> Tensor:
        """0: conditional, 1: unconditional."""
        if index == 0:
            return self.positive
        assert self.negative is not None, "an unguided request has no unconditional branch"
        return self.negative


def branch_names(*, guided: bool) -> tuple[str, ...]:
    """What the ids of each branch are called in a request."""
    return ("prompt", "negative") if guided else ("prompt",)


def ids_of(request: GenerationRequest, name: str, most: int, least: int = 1) -> tuple[int, ...]:
    """The request's token ids of that name. Raises InvalidRequest: fewer than `least` or more than `most`."""
    ids = request.token_ids.get(name, ())
    if not least <= len(ids) <= most:
        raise InvalidRequest(f"token_ids[{name!r}]: {least} to {most} ids expected, got {len(ids)}", param="token_ids")
    return ids
