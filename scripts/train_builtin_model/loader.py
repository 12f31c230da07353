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
from train_builtin_model.scenes import LENGTH_WEIGHTS, LENGTHS, Scene, SceneMaker
from train_builtin_model.tokenizer import build_tokenizer
from train_builtin_model.vocab import core_sprites, load_vocabulary

CAPTION_TOKENS = 31  # the longest caption, end mark included, has fewer
MENTIONS = 2  # at most so many objects of a scene have noun phrases of their own


@dataclass(frozen=True, slots=True)
class Block:
    """frames of each clip; ids: (n, 31) int16, zero padded; the scenes; where each mention stands and what it says.

    spans: (n, 2, 2) int8, first token and the one after the last of each mention, equal where there is none;
    places: (n, 2, 6) float32, x, y and size of its object at the first and at the last frame, from -2 to 2.
    """

    frames: int
    ids: torch.Tensor
    scenes: SceneBatch
    spans: torch.Tensor
    places: torch.Tensor


def find_tokens(tokens: list[int], part: list[int], start: int) -> int:
    """Where `part` first stands in `tokens` at or after `start`. Raises ValueError: nowhere."""
    for first in range(start, len(tokens) - len(part) + 1):
        if tokens[first : first + len(part)] == part:
            return first
    raise ValueError(f"tokens {part} expected in {tokens} from {start} on")


def pack_mentions(
    scenes: list[Scene], captions: list[list[int]], phrases: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> spans, places of a Block. phrases: the tokens of all mentions of all scenes in order, without end marks."""
    spans = np.zeros((len(scenes), MENTIONS, 2), np.int8)
    places = np.zeros((len(scenes), MENTIONS, 6), np.float32)
    following = iter(phrases)
    for row, (scene, tokens) in enumerate(zip(scenes, captions, strict=True)):
        end = 0
        for place, (_, index) in enumerate(scene.mentions):
            phrase = next(following)
            first = find_tokens(tokens, phrase, end)
            end = first + len(phrase)
            spans[row, place] = first, end
            numbers = scene.objects[index][1]
            places[row, place] = (np.asarray([*numbers[0:3], *numbers[4:7]], np.float32) - 64) / 32
    return torch.from_numpy(spans), torch.from_numpy(places)


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
            phrases = [phrase for scene in scenes for phrase, _ in scene.mentions]
            tokens = [t[:-1] for t in tokenizer(phrases)["input_ids"]] if phrases else []
            yield Block(
                frames, torch.from_numpy(ids), pack_scenes(scenes, array_rng), *pack_mentions(scenes, encoded, tokens)
            )


def start_loader(dataset: SceneBlocks, workers: int) -> Iterator[Block]:
    """An endless iterator over blocks; workers = 0 draws them in this process."""
    options = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    return iter(DataLoader(dataset, batch_size=None, num_workers=workers, **options))
