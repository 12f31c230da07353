"""Euler's method on the probability-flow ODE; follows diffusers' FlowMatchEulerDiscreteScheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from safelight.runtime.pipelines.protocol import SamplerState
from safelight.runtime.samplers.schedule import FlowConfig, Schedule

Table = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Euler:
    """First order; remembers the latest prediction, for previews only."""

    config: FlowConfig

    def schedule(self, steps: int, tokens: int | None = None) -> Schedule:
        """Raises ValueError for a shift that grows with the image, without its tokens."""
        config = self.config
        table = _unit_table(steps, config) if config.unit_table else _trained_table(steps, config)
        if config.dynamic is None:
            shifted = _shifted(table, config.shift)
        elif tokens is None:
            raise ValueError("this schedule depends on the image's tokens")
        else:
            factor = config.dynamic.factor(tokens)
            shifted = factor / (factor + (1 / table - 1))
        if config.terminal is not None:
            left = 1 - shifted
            shifted = 1 - left / (left[-1] / (1 - config.terminal)) if left[-1] else shifted
        sigmas = shifted.astype(np.float32)
        timesteps = (sigmas * np.float32(config.train_timesteps)).tolist()
        return Schedule(torch.from_numpy(np.append(sigmas, np.float32(0))), tuple(timesteps))

    def step(
        self, sigmas: Sequence[float], index: int, sample: torch.Tensor, velocity: torch.Tensor, state: SamplerState
    ) -> tuple[torch.Tensor, SamplerState]:
        """x' = x + (sigma' - sigma) * v."""
        return sample + (sigmas[index + 1] - sigmas[index]) * velocity, SamplerState(velocity=velocity)


def _shifted(table: Table, shift: float) -> Table:
    """(n,) sigmas, moved towards 1 by a shift greater than 1, in the table's precision."""
    moved: Table = shift * table / (1 + (shift - 1) * table)
    return moved


def _unit_table(steps: int, config: FlowConfig) -> Table:
    """(steps,) float32."""
    if config.torch_table:
        single: Table = torch.linspace(1.0, 1 / steps, steps, device="cpu").numpy()
        return single
    return np.linspace(1.0, 1 / steps, steps).astype(np.float32)


def _trained_table(steps: int, config: FlowConfig) -> Table:
    """(steps,) float64 between the ends of the training table, which the reference shifts already (and the result
    again)."""
    n = config.train_timesteps
    ends = np.array([n, 1], np.float32) / n
    first, last = _shifted(ends, config.shift).tolist()
    return np.linspace(first * n, last * n, steps) / n
