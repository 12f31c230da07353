"""Worker processes that draw scenes and tokenize captions, and hand over blocks of tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from train_builtin_model.compose import SceneBatch, pack_scenes
from train_builtin_model.scenes import LENGTH_WEIGHTS, LENGTHS, SceneMaker
from train_builtin_model.tokenizer import build_tokenizer
from train_builtin_model.vocab import core_sprites, load_vocabulary

CAPTION_TOKENS = 31  # the longest caption, end mark included, has fewer


@dataclass(frozen=True, slots=True)
class Block:
    """frames of each clip; ids: (n, 31) int16, zero padded; the scenes."""

    frames: int
    ids: torch.Tensor
    scenes: SceneBatch


class SceneBlocks(IterableDataset[Block]):
    """Endless blocks: `images` one-frame scenes or `videos` clips of one of `lengths`, by turns at random.

    `progress` is in memory that the workers share; writing to it moves their curriculum on.
    """

    def __init__(
        self, clash: NDArray[np.float32], images: int, videos: int, video_share: float, seed: int, core: bool = False,
        lengths: tuple[int, ...] = LENGTHS,
    ) -> None:  # fmt: skip
        self.clash, self.images, self.videos, self.video_share, self.seed = clash, images, videos, video_share, seed
        self.core, self.lengths = core, lengths
        self.progress = torch.ones(1).share_memory_()

    def __iter__(self) -> Iterator[Block]:
        info = get_worker_info()
        seed = self.seed * 1000 + (info.id if info else 0)
        vocabulary = load_vocabulary()
        maker = SceneMaker(vocabulary, self.clash, seed, core_sprites(vocabulary) if self.core else None)
        tokenizer = build_tokenizer(vocabulary)
        rng, array_rng = random.Random(seed + 500), np.random.default_rng(seed)
        weights = [w for length, w in zip(LENGTHS, LENGTH_WEIGHTS, strict=True) if length in self.lengths]
        while True:
            maker.progress = float(self.progress)
            if rng.random() < self.video_share:
                frames = rng.choices(self.lengths, weights)[0]
                scenes = [maker.video(frames) for _ in range(self.videos)]
            else:
                frames = 1
                scenes = [maker.image() for _ in range(self.images)]
            encoded = tokenizer([s.caption for s in scenes])["input_ids"]
            ids = np.zeros((len(scenes), CAPTION_TOKENS), np.int16)
            for row, tokens in zip(ids, encoded, strict=True):
                row[: len(tokens)] = tokens
            yield Block(frames, torch.from_numpy(ids), pack_scenes(scenes, array_rng))


def start_loader(dataset: SceneBlocks, workers: int) -> Iterator[Block]:
    """An endless iterator over blocks; workers = 0 draws them in this process."""
    options = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    return iter(DataLoader(dataset, batch_size=None, num_workers=workers, **options))
