"""Scenes kept on the GPU, encoded or as pixels; batches are drawn from them while new ones replace the oldest.

Drawing is a gather at random rows, made of operations that a CUDA graph can record; the number of filled rows is a
tensor, so a graph sees the bank grow.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from train_builtin_model.clip_vae import ClipVae
from train_builtin_model.compose import RESOLUTION, Compositor
from train_builtin_model.loader import CAPTION_TOKENS, MENTIONS, Block
from train_builtin_model.models import LATENT_CHANNELS

FRAME_RATIO = 4  # frames to a latent frame, after the first


class Ring:
    """Rows of one or more tensors that belong together; new rows replace the oldest once all are filled."""

    def __init__(self, columns: list[torch.Tensor]) -> None:
        self.columns = columns
        self.capacity, self.device = columns[0].shape[0], columns[0].device
        self.filled = self.head = 0
        self.rows = torch.zeros((), device=self.device)  # filled, for the GPU

    def add(self, *values: torch.Tensor) -> None:
        """One tensor for each column, with equally many rows, at most the capacity."""
        count = values[0].shape[0]
        rows = torch.arange(self.head, self.head + count, device=self.device) % self.capacity
        for column, value in zip(self.columns, values, strict=True):
            column[rows] = value.to(column.dtype)
        self.head = (self.head + count) % self.capacity
        self.filled = min(self.capacity, self.filled + count)
        self.rows.fill_(self.filled)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """-> (count,) row numbers, evenly, with repetition."""
        return (torch.rand(count, device=self.device, generator=generator) * self.rows).long()


@dataclass(frozen=True, slots=True)
class Examples:
    """latents (n, C, T, 16, 16) float32, ids (n, 31) int64; spans and places as in loader.Block."""

    latents: torch.Tensor
    ids: torch.Tensor
    spans: torch.Tensor
    places: torch.Tensor


class LatentRing(Ring):
    """Latents, captions and mentions of one clip length."""

    def __init__(self, capacity: int, latent_frames: int, device: torch.device) -> None:
        shape = (capacity, LATENT_CHANNELS, latent_frames, 16, 16)
        latents = torch.empty(shape, dtype=torch.bfloat16, device=device)
        ids = torch.zeros((capacity, CAPTION_TOKENS), dtype=torch.int16, device=device)
        spans = torch.zeros((capacity, MENTIONS, 2), dtype=torch.int8, device=device)
        super().__init__([latents, ids, spans, torch.zeros((capacity, MENTIONS, 6), device=device)])

    def batch(self, count: int, generator: torch.Generator) -> Examples:
        """`count` rows."""
        rows = self.draw(count, generator)
        latents, ids, spans, places = (column[rows] for column in self.columns)
        return Examples(latents.float(), ids.long(), spans.long(), places)


class PixelRing(Ring):
    """Pictures of one clip length, as bytes: (capacity, 3, F, 128, 128)."""

    def __init__(self, capacity: int, frames: int, device: torch.device) -> None:
        shape = (capacity, 3, frames, RESOLUTION, RESOLUTION)
        super().__init__([torch.empty(shape, dtype=torch.uint8, device=device)])

    def batch(self, count: int, size: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        """-> (count, 3, F, size, size) in [-1, 1]: a window of its own for each, on the grid of latents."""
        rows = self.draw(count, generator)[:, None, None]
        steps = (RESOLUTION - size) // 8 + 1
        corner = torch.rand(2, count, 1, device=self.device, generator=generator) * steps
        window = 8 * corner.long() + torch.arange(size, device=self.device)
        pixels = self.columns[0][rows, :, :, window[0][:, :, None], window[1][:, None, :]]
        return (pixels.to(dtype) / 127.5 - 1).permute(0, 3, 4, 1, 2)


class Bank(ABC):
    """One ring for every clip length; `refill` draws and stores one block, `store` says in which form."""

    def __init__(self, compositor: Compositor, blocks: Iterator[Block], device: torch.device) -> None:
        self.compositor, self.blocks, self.device = compositor, blocks, device

    @abstractmethod
    def filled(self) -> dict[int, int]:
        """Rows in each ring, by the number of frames."""

    @abstractmethod
    def store(self, block: Block, video: torch.Tensor) -> None:
        """video: (B, 3, F, 128, 128) in [-1, 1]."""

    @torch.no_grad()
    def refill(self) -> None:
        """Draw and store one block."""
        block = next(self.blocks)
        self.store(block, self.compositor.render(block.scenes.to(self.device), block.frames))

    def fill(self, seconds: float) -> float:
        """Refill for so long, and until no ring is empty. -> seconds that one block takes."""
        start, count = time.monotonic(), 0
        while time.monotonic() - start < seconds or not all(self.filled().values()):
            self.refill()
            count += 1
            if count % 8 == 0 and self.device.type == "cuda":
                torch.cuda.synchronize()
        taken = time.monotonic() - start
        print(f"bank {self.filled()} after {taken:.1f} s, {taken / count * 1e3:.1f} ms a block", flush=True)
        return taken / count


class LatentBank(Bank):
    """Scenes encoded by a frozen autoencoder, normalised by the statistics of its latents."""

    def __init__(
        self, compositor: Compositor, blocks: Iterator[Block], device: torch.device, clip_vae: ClipVae,
        capacity: dict[int, int], statistics: tuple[list[float], list[float]],
    ) -> None:  # fmt: skip
        super().__init__(compositor, blocks, device)
        self.clip_vae = clip_vae
        self.rings = {f: LatentRing(n, (f - 1) // FRAME_RATIO + 1, device) for f, n in capacity.items()}
        self.mean, self.std = (torch.tensor(s, device=device).view(1, -1, 1, 1, 1) for s in statistics)

    def filled(self) -> dict[int, int]:
        """Rows in each ring, by the number of frames."""
        return {frames: ring.filled for frames, ring in self.rings.items()}

    def store(self, block: Block, video: torch.Tensor) -> None:
        """Encode, normalise, keep with the caption."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean, _ = self.clip_vae.encode(video)
        labels = (tensor.to(self.device, non_blocking=True) for tensor in (block.ids, block.spans, block.places))
        self.rings[block.frames].add((mean - self.mean) / self.std, *labels)


class PixelBank(Bank):
    """Scenes as pictures, for training the autoencoder; clips of other lengths than it keeps are cut."""

    def __init__(
        self, compositor: Compositor, blocks: Iterator[Block], device: torch.device, capacity: dict[int, int]
    ) -> None:
        super().__init__(compositor, blocks, device)
        self.rings = {frames: PixelRing(count, frames, device) for frames, count in capacity.items()}

    def filled(self) -> dict[int, int]:
        """Rows in each ring, by the number of frames."""
        return {frames: ring.filled for frames, ring in self.rings.items()}

    def store(self, block: Block, video: torch.Tensor) -> None:
        """Keep as bytes in the ring of the length, if there is one."""
        if block.frames in self.rings:
            self.rings[block.frames].add(((video.float() + 1) * 127.5).round().clamp(0, 255))
