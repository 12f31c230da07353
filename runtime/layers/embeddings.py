"""Embeddings of timesteps and text, and the patches of a video."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.kernels.dispatch import KernelSet
from safelight.runtime.layers.linear import Adapters, Linear, adapters_of


def timestep_sinusoids(timestep: Tensor, width: int) -> Tensor:
    """timestep: (...) -> (..., width) float32: cosines, then sines (arXiv 2006.11239's, with the halves swapped)."""
    half = width // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[..., None] * exponent.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """timestep: (B, N) -> (B, N, E), computed in its weights' dtype (loaded as float32)."""

    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear_in = Linear(frequencies, width)
        self.linear_out = Linear(width, width)

    def forward(self, timestep: Tensor, adapters: Adapters | None = None) -> Tensor:
        x = timestep_sinusoids(timestep, self.frequencies)
        x = F.silu(self.linear_in(x, adapters_of(adapters, "linear_in")))
        embedded: Tensor = self.linear_out(x, adapters_of(adapters, "linear_out"))
        return embedded


class FeedForward(nn.Module):
    """x: (..., in) -> (..., out) through `hidden` with tanh-approximated GELU; also the text projection."""

    def __init__(self, width_in: int, hidden: int, width_out: int, kernels: KernelSet) -> None:
        super().__init__()
        self.kernels = kernels
        self.up = Linear(width_in, hidden)
        self.down = Linear(hidden, width_out)

    def forward(self, x: Tensor, adapters: Adapters | None = None) -> Tensor:
        hidden = self.up.gelu(x, self.kernels, adapters_of(adapters, "up"))
        y: Tensor = self.down(hidden, adapters_of(adapters, "down"))
        return y


def patchify(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, C, F, h, w) -> (B, S, C * pf * ph * pw): the operand of a Conv3d with that kernel and stride. Inverse:
    `packed_to_latents`."""
    b, c, f, h, w = latents.shape
    pf, ph, pw = patch
    x = latents.view(b, c, f // pf, pf, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * pf * ph * pw)


def packed_to_latents(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """(B, S, C * pf * ph * pw) -> (B, C, F, h, w): the inverse of `patchify`, for models whose output has its channels
    outermost (FLUX, Qwen-Image)."""
    x = tokens.reshape(tokens.shape[0], *grid, -1, *patch)
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """(B, S, pf * ph * pw * C) -> (B, C, F, h, w) for a token grid (frames, rows, columns)."""
    x = tokens.reshape(tokens.shape[0], *grid, *patch, -1)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
