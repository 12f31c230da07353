"""Small pictures of unfinished latents: the predicted x_0 of the middle frame, through one small matrix.

Early latents are noise and look like it; what the model takes them for is a picture almost from the first steps. See
configs/families/latent_rgb.py for the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from safelight.configs.families.latent_rgb import LatentRgb, factors_of
from safelight.runtime.pipelines.protocol import DenoiseState


@dataclass(frozen=True, slots=True)
class LatentColours:
    """The factors of a VAE on the device: matrix (C, 3), bias (3,), float32, for values in [-1, 1]; `later`: of latent
    frames after the first."""

    matrix: torch.Tensor
    bias: torch.Tensor
    later: LatentColours | None = None

    def preview(self, state: DenoiseState) -> torch.Tensor | None:
        """uint8 (h, w, 3) of the middle frame, on the device; None before the first step."""
        predicted = predicted_x0(state)
        if predicted is None:
            return None
        middle = predicted.shape[1] // 2
        colours = self.later if middle > 0 and self.later is not None else self
        return colours.paint(predicted[:, middle])

    def paint(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (C, h, w) -> uint8 (h, w, 3)."""
        unit = (latents.float().permute(1, 2, 0) @ self.matrix + self.bias + 1) / 2
        return (unit.clamp(0, 1) * 255).round().to(torch.uint8)


def predicted_x0(state: DenoiseState) -> torch.Tensor | None:
    """The finished latents (C, F, h, w) as the latest step predicted them; None before the first one.

    UniPC keeps just that. Euler's x' is on the line from x_0 along the velocity, so x_0 = x' - sigma' * v.
    """
    memory = state.sampler
    if memory.model_outputs:
        return memory.model_outputs[-1]
    if memory.velocity is None:
        return None
    return state.latents - float(state.sigmas[state.step]) * memory.velocity


def load_colours(vae: Path, device: torch.device) -> LatentColours | None:
    """Of the VAE in a folder; None when its factors are not known. Raises ModelError."""
    factors = factors_of(vae)
    return None if factors is None else _on(factors, device)


def _on(factors: LatentRgb, device: torch.device) -> LatentColours:
    later = None if factors.later is None else _on(factors.later, device)
    return LatentColours(torch.tensor(factors.matrix, device=device), torch.tensor(factors.bias, device=device), later)
