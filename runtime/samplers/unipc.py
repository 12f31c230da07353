"""UniPC of order 1 or 2 in data prediction, B(h) = expm1(h) variant, for flow matching.

W. Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (2023); follows
diffusers' UniPCMultistepScheduler with flow sigmas. With alpha = 1 - sigma, lambda = log(alpha / sigma), h the step in
lambda and m the predictions of x_0, predictor and corrector are both
    x' = (sigma' / sigma) * x - alpha' * expm1(-h) * (m_0 + sum_k rho_k * D_k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import expm1, inf, log

import numpy as np
import torch

from safelight.runtime.pipelines.protocol import SamplerState
from safelight.runtime.samplers.schedule import FlowConfig, Schedule


@dataclass(frozen=True, slots=True)
class UniPC:
    """Every step first corrects the sample with the new prediction (from the second step on), then predicts."""

    config: FlowConfig

    def schedule(self, steps: int, tokens: int | None = None) -> Schedule:
        """Timesteps are truncated to integers from the float64 table, as in the reference."""
        n, shift = self.config.train_timesteps, self.config.shift
        table = np.linspace(1, 1 / n, steps + 1)[:-1]
        table = shift * table / (1 + (shift - 1) * table)
        if abs(table[0] - 1) < 1e-6:
            table[0] -= 1e-6  # keeps log(alpha) finite
        timesteps = (table * n).astype(np.int64).tolist()
        return Schedule(torch.from_numpy(np.append(table, 0.0).astype(np.float32)), tuple(map(float, timesteps)))

    def step(
        self, sigmas: Sequence[float], index: int, sample: torch.Tensor, velocity: torch.Tensor, state: SamplerState
    ) -> tuple[torch.Tensor, SamplerState]:
        """Corrector of the previous step's order, then the predictor; the last step has order 1."""
        prediction = sample - sigmas[index] * velocity
        if state.last_sample is not None:
            sample = _correct(sigmas, index, state, prediction)
        outputs = (*state.model_outputs, prediction)[-self.config.solver_order :]
        order = min(self.config.solver_order, len(sigmas) - 1 - index, len(outputs))
        return _predict(sigmas, index, sample, outputs, order), SamplerState(outputs, sample, order)


def _predict(
    sigmas: Sequence[float], index: int, sample: torch.Tensor, outputs: tuple[torch.Tensor, ...], order: int
) -> torch.Tensor:
    """UniP: rho_1 = 1/2 for order 2."""
    scale, factor, h = _step_size(sigmas, index, index + 1)
    x = scale * sample - factor * outputs[-1]
    if order == 2:
        ratio = (_lambda(sigmas[index - 1]) - _lambda(sigmas[index])) / h
        x = x - 0.5 * factor * ((outputs[-2] - outputs[-1]) / ratio)
    return x


def _correct(sigmas: Sequence[float], index: int, state: SamplerState, prediction: torch.Tensor) -> torch.Tensor:
    """UniC: takes the previous step again, now knowing the prediction at its end."""
    assert state.last_sample is not None
    scale, factor, h = _step_size(sigmas, index - 1, index)
    newest = state.model_outputs[-1]
    x = scale * state.last_sample - factor * newest
    if state.order == 1:
        return x - 0.5 * factor * (prediction - newest)
    ratio = (_lambda(sigmas[index - 2]) - _lambda(sigmas[index - 1])) / h
    phi_2 = expm1(-h) / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / expm1(-h), 2 * phi_3 / expm1(-h)
    rho_1 = (b_1 - b_2) / (1 - ratio)  # solves [[1, 1], [ratio, 1]] rho = b
    correction = rho_1 * ((state.model_outputs[-2] - newest) / ratio) + (b_1 - rho_1) * (prediction - newest)
    return x - factor * correction


def _step_size(sigmas: Sequence[float], start: int, end: int) -> tuple[float, float, float]:
    """(sigma'/sigma, alpha' * expm1(-h), h) from sigmas[start] to sigmas[end]."""
    h = _lambda(sigmas[end]) - _lambda(sigmas[start])
    return sigmas[end] / sigmas[start], (1 - sigmas[end]) * expm1(-h), h


def _lambda(sigma: float) -> float:
    return log((1 - sigma) / sigma) if sigma > 0 else inf
