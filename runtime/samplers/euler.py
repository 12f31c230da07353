"""Euler's method on the probability-flow ODE; follows diffusers' FlowMatchEulerDiscreteScheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from safelight.runtime.pipelines.protocol import SamplerState
from safelight.runtime.samplers.schedule import FlowConfig, Schedule


@dataclass(frozen=True, slots=True)
class Euler:
    """First order; remembers the latest prediction, for previews only."""

    config: FlowConfig

    def schedule(self, steps: int) -> Schedule:
        """The reference shifts both ends of its training table and then the table interpolated between them again."""
        n, shift = self.config.train_timesteps, self.config.shift
        first, last = ((ends := np.array([n, 1], np.float32) / n) * shift / (1 + (shift - 1) * ends)).tolist()
        table = np.linspace(first * n, last * n, steps) / n
        sigmas = (shift * table / (1 + (shift - 1) * table)).astype(np.float32)
        timesteps = (sigmas * np.float32(n)).tolist()
        return Schedule(torch.from_numpy(np.append(sigmas, np.float32(0))), tuple(timesteps))

    def step(
        self, sigmas: Sequence[float], index: int, sample: torch.Tensor, velocity: torch.Tensor, state: SamplerState
    ) -> tuple[torch.Tensor, SamplerState]:
        """x' = x + (sigma' - sigma) * v."""
        return sample + (sigmas[index + 1] - sigmas[index]) * velocity, SamplerState(velocity=velocity)
