"""Encoded scenes on the GPU, from which training batches are drawn while new ones replace the oldest."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from train_builtin_model.clip_vae import ClipVae
from train_builtin_model.compose import Compositor
from train_builtin_model.loader import CAPTION_TOKENS, Block
from train_builtin_model.models import LATENT_CHANNELS


class LatentRing:
    """A ring of (latents, caption ids) of one clip length."""

    def __init__(self, capacity: int, latent_frames: int, device: torch.device) -> None:
        shape = (capacity, LATENT_CHANNELS, latent_frames, 16, 16)
        self.latents = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.ids = torch.zeros((capacity, CAPTION_TOKENS), dtype=torch.int16, device=device)
        self.filled = self.head = 0

    def add(self, latents: torch.Tensor, ids: torch.Tensor) -> None:
        """latents: (n, C, T, 16, 16), ids: (n, 31)."""
        capacity = self.latents.shape[0]
        rows = torch.arange(self.head, self.head + latents.shape[0], device=self.latents.device) % capacity
        self.latents[rows] = latents.to(self.latents.dtype)
        self.ids[rows] = ids
        self.head = (self.head + latents.shape[0]) % capacity
        self.filled = min(capacity, self.filled + latents.shape[0])

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> latents (count, C, T, 16, 16) float32, ids (count, 31) int64."""
        rows = torch.randint(self.filled, (count,), device=self.latents.device)
        return self.latents[rows].float(), self.ids[rows].long()


class LatentBank:
    """One ring for every clip length; `refill` encodes one block with the frozen VAE."""

    def __init__(
        self, clip_vae: ClipVae, compositor: Compositor, blocks: Iterator[Block], capacity: dict[int, int],
        statistics: tuple[list[float], list[float]], device: torch.device,
    ) -> None:  # fmt: skip
        self.clip_vae, self.compositor, self.blocks, self.device = clip_vae, compositor, blocks, device
        self.rings = {f: LatentRing(n, (f - 1) // 4 + 1, device) for f, n in capacity.items()}
        mean, std = (torch.tensor(s, device=device).view(1, -1, 1, 1, 1) for s in statistics)
        self.mean, self.std = mean, std

    @torch.no_grad()
    def refill(self) -> None:
        """Draw, encode and normalise one block."""
        block = next(self.blocks)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean, _ = self.clip_vae.encode(self.compositor.render(block.scenes.to(self.device), block.frames))
        self.rings[block.frames].add((mean - self.mean) / self.std, block.ids.to(self.device))

    def fill(self, seconds: float) -> float:
        """Refill for so long, and until no ring is empty. -> seconds that one block takes."""
        start, count = time.monotonic(), 0
        while time.monotonic() - start < seconds or not all(r.filled for r in self.rings.values()):
            self.refill()
            count += 1
            if count % 8 == 0 and self.device.type == "cuda":
                torch.cuda.synchronize()
        return (time.monotonic() - start) / count
