"""From what a VAE gives to frames."""

from __future__ import annotations

import torch


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """(3, F, H, W) about [-1, 1] -> uint8 (F, H, W, 3), rounded as the reference: in `pixels`' dtype, then float32."""
    unit = (pixels.clamp(-1, 1) * 0.5 + 0.5).clamp(0, 1)
    return (unit.permute(1, 2, 3, 0).float() * 255).round().to(torch.uint8)
