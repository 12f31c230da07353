"""The one linear layer, with three seams: weight format, adapters passed per call, placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.kernels.dispatch import KernelSet


class Adapter(NamedTuple):
    """A low-rank addition to one layer: y += scale * (x @ down^T) @ up^T. down: (r, in), up: (out, r)."""

    down: Tensor
    up: Tensor
    scale: float


Adapters = Mapping[str, tuple[Adapter, ...]]  # by the name of the Linear within the module that gets them


def scoped(adapters: Adapters | None, prefix: str) -> Adapters | None:
    """The adapters of the submodule `prefix`, under their names within it; None when it has none."""
    if adapters is None:
        return None
    inner = {name[len(prefix) + 1 :]: each for name, each in adapters.items() if name.startswith(prefix + ".")}
    return inner or None


class WeightFormat(Protocol):
    """How a weight matrix is stored, and how it multiplies."""

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the stored tensors."""

    def apply(self, x: Tensor, stored: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """x: (..., in) -> (..., out)."""

    def apply_gelu(self, x: Tensor, stored: Mapping[str, Tensor], bias: Tensor, kernels: KernelSet) -> Tensor:
        """The same and GELU (tanh-approximated)."""


class Placement(Protocol):
    """Where the stored tensors are, and how they come to the device for one call."""

    def fetch(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors on the compute device."""


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """One `weight`: (out, in) in the layer's dtype."""

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (out_features, in_features)}

    def apply(self, x: Tensor, stored: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return F.linear(x, stored["weight"], bias)

    def apply_gelu(self, x: Tensor, stored: Mapping[str, Tensor], bias: Tensor, kernels: KernelSet) -> Tensor:
        return kernels.linear_gelu(x, stored["weight"], bias)


@dataclass(frozen=True, slots=True)
class Resident:
    """Weights stay on the device."""

    def fetch(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return stored


class Linear(nn.Module):
    """y = x W^T + b, x: (..., in) -> (..., out). Parameters are uninitialised: a loader fills them."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        weight_format: WeightFormat | None = None,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.weight_format: WeightFormat = weight_format or PlainWeight()
        self.placement: Placement = placement or Resident()
        shapes = self.weight_format.shapes(in_features, out_features)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
        self.stored_names = tuple(shapes)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor, adapters: tuple[Adapter, ...] = ()) -> Tensor:
        stored = self.placement.fetch({name: getattr(self, name) for name in self.stored_names})
        y = self.weight_format.apply(x, stored, self.bias)
        for adapter in adapters:
            y = y + F.linear(F.linear(x, adapter.down), adapter.up) * adapter.scale
        return y

    def gelu(self, x: Tensor, kernels: KernelSet, adapters: tuple[Adapter, ...] = ()) -> Tensor:
        """GELU (tanh-approximated) of this layer's result, in one kernel where nothing comes in between."""
        if adapters or self.bias is None:
            return F.gelu(self(x, adapters), approximate="tanh")
        stored = self.placement.fetch({name: getattr(self, name) for name in self.stored_names})
        return self.weight_format.apply_gelu(x, stored, self.bias, kernels)


def adapters_of(adapters: Adapters | None, name: str) -> tuple[Adapter, ...]:
    """The adapters of one Linear."""
    return () if adapters is None else adapters.get(name, ())
