"""Draws scenes on the GPU: glyphs from an atlas, scaled, turned and placed over plain backgrounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from train_builtin_model.scenes import MAX_OBJECTS, Scene
from train_builtin_model.vocab import BACKGROUNDS

RESOLUTION = 128
GLYPH = 128  # pixels of one atlas entry


@dataclass(frozen=True, slots=True)
class SceneBatch:
    """sprite: (B, 4) int64; path: (B, 4, 10) float32; count: (B,) int64; background: (B, 3) float32 in [0, 1].

    `count` stays on the CPU, where the compositor reads it without waiting for the GPU.
    """

    sprite: torch.Tensor
    path: torch.Tensor
    count: torch.Tensor
    background: torch.Tensor

    def to(self, device: torch.device) -> SceneBatch:
        """The same on another device."""
        sprite, path, background = (t.to(device, non_blocking=True) for t in (self.sprite, self.path, self.background))
        return SceneBatch(sprite, path, self.count, background)


def pack_scenes(scenes: list[Scene], rng: np.random.Generator) -> SceneBatch:
    """Scenes as tensors; the background colour is varied a little, too little to change its name."""
    sprite = np.zeros((len(scenes), MAX_OBJECTS), np.int64)
    path = np.zeros((len(scenes), MAX_OBJECTS, 10), np.float32)
    path[..., 2] = path[..., 6] = 1.0
    for i, scene in enumerate(scenes):
        for k, (index, numbers) in enumerate(scene.objects):
            sprite[i, k] = index
            path[i, k] = numbers
    count = np.asarray([len(s.objects) for s in scenes], np.int64)
    background = np.asarray([BACKGROUNDS[s.background] for s in scenes], np.float32)
    background = np.clip(background + rng.uniform(-5, 5, background.shape), 0, 255).astype(np.float32) / 255.0
    return SceneBatch(*(torch.from_numpy(a) for a in (sprite, path, count, background)))


class Compositor:
    """Holds the atlas: three sharpness levels of every glyph, with premultiplied alpha."""

    def __init__(self, rgba: NDArray[np.uint8], device: torch.device, dtype: torch.dtype) -> None:
        atlas = torch.from_numpy(rgba).permute(0, 3, 1, 2).float() / 255.0
        atlas[:, :3] *= atlas[:, 3:]
        levels = [atlas]
        for factor in (2, 4):
            small = F.avg_pool2d(atlas, factor)
            levels.append(F.interpolate(small, size=GLYPH, mode="bilinear", align_corners=False))
        self.count = atlas.shape[0]
        self.atlas = torch.cat(levels).to(device=device, dtype=dtype)

    def render(self, batch: SceneBatch, frames: int) -> torch.Tensor:
        """-> (B, 3, F, 128, 128) in [-1, 1], in the atlas's dtype, memory laid out frame by frame."""
        size = batch.sprite.shape[0]
        out = batch.background.to(self.atlas.dtype)[:, None, :, None, None]
        out = out.expand(size, frames, 3, RESOLUTION, RESOLUTION).contiguous()
        for k in range(MAX_OBJECTS):
            rows = (batch.count > k).nonzero().squeeze(1)
            if rows.numel() == 0:
                break
            rows = rows.to(out.device, non_blocking=True)
            layer = self._layer(batch.sprite[rows, k], batch.path[rows, k], frames)
            out[rows] = layer[:, :, :3] + out[rows] * (1 - layer[:, :, 3:])
        return (out * 2 - 1).permute(0, 2, 1, 3, 4)

    def _layer(self, sprite: torch.Tensor, path: torch.Tensor, frames: int) -> torch.Tensor:
        """sprite: (N,), path: (N, 10) -> (N, F, 4, 128, 128): one object of each scene, premultiplied."""
        u = torch.linspace(0, 1, frames, device=path.device) if frames > 1 else torch.zeros(1, device=path.device)
        place = path[:, None, 0:4] + (path[:, None, 4:8] - path[:, None, 0:4]) * u[None, :, None]
        x, y, pixels, angle = place.unbind(-1)
        y = y - path[:, None, 8] * torch.sin(torch.pi * path[:, None, 9] * u[None]).abs()
        ratio = GLYPH / pixels
        level = (ratio > 1.33).long() + (ratio > 2.67).long()
        index = (level * self.count + sprite[:, None]).flatten()
        # Inverse map: where in the glyph (from -1 to 1) each pixel of the frame (from -1 to 1) comes from.
        scale = (RESOLUTION / pixels).flatten()
        cos, sin = torch.cos(angle).flatten() * scale, torch.sin(angle).flatten() * scale
        cx, cy = (x / RESOLUTION * 2 - 1).flatten(), (y / RESOLUTION * 2 - 1).flatten()
        theta = torch.stack(
            [cos, sin, -(cos * cx + sin * cy), -sin, cos, -(-sin * cx + cos * cy)], dim=1
        ).view(-1, 2, 3)  # fmt: skip
        grid = F.affine_grid(theta, [index.numel(), 4, RESOLUTION, RESOLUTION], align_corners=False)
        drawn = F.grid_sample(self.atlas[index], grid.to(self.atlas.dtype), padding_mode="zeros", align_corners=False)
        return drawn.view(sprite.shape[0], frames, 4, RESOLUTION, RESOLUTION)
