"""Measures a diffusers-format folder: subjects, background colours, sides of two subjects, motion, speed.

Usage: python -m train_builtin_model.evaluate --folder runtime/models/builtin_model --sprites work/sprites.npz

Prompts come from a fixed seed. The nearest reference is sought among the renders of the whole vocabulary, colours
included; where a prompt names a colour, the picture must be nearest to that very colour.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray

from train_builtin_model import captions
from train_builtin_model.metrics import References, background_name, border_colour, motion_kind
from train_builtin_model.scenes import CLASH
from train_builtin_model.vocab import BACKGROUNDS, Vocabulary, core_sprites, load_vocabulary

RESOLUTION, FRAMES = 128, 17


@dataclass(frozen=True, slots=True)
class Case:
    """prompt; the sprites in reading order (first is left or top); background; direction or motion."""

    prompt: str
    sprites: tuple[int, ...]
    background: str
    kind: str = ""


class CaseMaker:
    """Draws prompts. Backgrounds are those on which the subject can be seen."""

    def __init__(self, vocabulary: Vocabulary, clash: NDArray[np.float32], seed: int, core: bool) -> None:
        self.vocabulary, self.clash, self.rng = vocabulary, clash, random.Random(seed)
        only = core_sprites(vocabulary) if core else range(len(vocabulary.sprites))
        families = [vocabulary.sprites_of(i) for i in range(len(vocabulary.subjects))]
        kept = ([s for s in family if s in only] for family in families)
        self.by_subject = [family for family in kept if family]

    def sprite(self) -> int:
        """A subject at random, then one of its pictures at random."""
        return self.rng.choice(self.rng.choice(self.by_subject))

    def phrase(self, sprite: int) -> str:
        """Say "a green car" if the picture is not the subject's first, else "a car"."""
        entry = self.vocabulary.sprites[sprite]
        subject = self.vocabulary.subjects[entry.subject]
        words = f"{entry.colour} {subject.noun}" if not entry.base else subject.noun
        return words if subject.mass else f"{captions.article(words)} {words}"

    def background(self, *sprites: int) -> str:
        """A background on which all can be seen."""
        clear = [n for j, n in enumerate(BACKGROUNDS) if all(self.clash[s, j] < CLASH for s in sprites)]
        return self.rng.choice(clear or ["white"])

    def _on(self, core: str, background: str) -> str:
        return f"{core} on {captions.article(background)} {background} background"

    def single(self) -> Case:
        """Such as "a green car on a yellow background"."""
        sprite = self.sprite()
        background = self.background(sprite)
        return Case(self._on(self.phrase(sprite), background), (sprite,), background)

    def pair(self) -> Case:
        """Such as "a dog to the left of a cat on a teal background", above and below likewise."""
        a, b = self.sprite(), self.sprite()
        background = self.background(a, b)
        relation = self.rng.choice(("to the left of", "to the right of", "above", "below"))
        prompt = self._on(f"{self.phrase(a)} {relation} {self.phrase(b)}", background)
        ordered = (a, b) if relation in ("to the left of", "above") else (b, a)
        return Case(prompt, ordered, background, "horizontal" if relation.startswith("to") else "vertical")

    def motion(self, index: int, turnable: NDArray[np.bool_]) -> Case:
        """Such as "a rocket moving up on a white background"; round things are not asked to rotate."""
        kinds = list(captions.MOTIONS)
        kind = kinds[index % len(kinds)]
        sprite = self.sprite()
        while kind == "rotate" and not turnable[sprite]:
            sprite = self.sprite()
        background = self.background(sprite)
        phrase = f"{self.phrase(sprite)} {captions.MOTIONS[kind][0]}"
        return Case(self._on(phrase, background), (sprite,), background, kind)


def turnable_sprites(rgba: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(N,) whether a quarter turn changes the outline or the picture enough to be told."""
    pictures = rgba[:, ::4, ::4].astype(np.float32) / 255.0
    pictures[..., :3] *= pictures[..., 3:]
    turned = np.rot90(pictures, axes=(1, 2))
    return np.asarray(np.abs(turned - pictures).mean(axis=(1, 2, 3)) > 0.08)


class Generator:
    """Runs the pipeline in batches; prompt i uses seed i."""

    def __init__(self, folder: Path, steps: int, guidance: float, shift: float | None, batch: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
        if shift is not None:
            self.pipeline.scheduler.register_to_config(flow_shift=shift)
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps, self.guidance, self.batch = steps, guidance, batch

    def __call__(self, prompts: list[str], frames: int) -> list[torch.Tensor]:
        """-> for each prompt (F, 3, 128, 128) in [0, 1]."""
        clips: list[torch.Tensor] = []
        for first in range(0, len(prompts), self.batch):
            part = prompts[first : first + self.batch]
            seeds = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
            out = self.pipeline(
                part, height=RESOLUTION, width=RESOLUTION, num_frames=frames, num_inference_steps=self.steps,
                guidance_scale=self.guidance, generator=seeds, output_type="np",
            ).frames  # fmt: skip
            clips += [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in out]
        return clips


def same(vocabulary: Vocabulary, found: int | None, wanted: int) -> bool:
    """The right subject, and the very picture if that is not the subject's first (a colour was named)."""
    if found is None:
        return False
    a, b = vocabulary.sprites[found], vocabulary.sprites[wanted]
    return found == wanted if not b.base else a.subject == b.subject


def halves(image: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, H, W) -> left and right, or top and bottom."""
    first, second = image.chunk(2, dim=2 if kind == "horizontal" else 1)
    return first, second


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """All figures, in percent."""
    sprites = np.load(args.sprites)
    rgba, vocabulary = sprites["rgba"], load_vocabulary()
    references, maker = References(rgba), CaseMaker(vocabulary, sprites["clash"], args.seed, args.core)
    generate = Generator(args.folder, args.steps, args.guidance, args.shift, args.batch)
    failures: list[str] = []
    scale = args.scale
    singles = [maker.single() for _ in range(max(1, round(200 * scale)))]
    right = colour = 0
    for case, clip in zip(singles, generate([c.prompt for c in singles], 1), strict=True):
        found = references.nearest(clip[0], border_colour(clip[0]))
        hit, painted = same(vocabulary, found, case.sprites[0]), background_name(clip[0]) == case.background
        right, colour = right + hit, colour + painted
        if not (hit and painted):
            seen = "nothing" if found is None else vocabulary.subjects[vocabulary.sprites[found].subject].noun
            failures.append(f"{case.prompt}: {seen}, {background_name(clip[0])}")
    pairs = [maker.pair() for _ in range(max(1, round(100 * scale)))]
    both = 0
    for case, clip in zip(pairs, generate([c.prompt for c in pairs], 1), strict=True):
        parts, background = halves(clip[0], case.kind), border_colour(clip[0])
        hits = [
            same(vocabulary, references.nearest(p, background), s) for p, s in zip(parts, case.sprites, strict=True)
        ]
        both += all(hits)
        if not all(hits):
            failures.append(f"{case.prompt}: {hits}")
    turnable = turnable_sprites(rgba)
    motions = [maker.motion(i, turnable) for i in range(max(1, round(100 * scale)))]
    moved = subject = 0
    for case, clip in zip(motions, generate([c.prompt for c in motions], FRAMES), strict=True):
        kind = motion_kind(clip)
        moved += kind == case.kind
        subject += same(vocabulary, references.nearest(clip[8], border_colour(clip[8])), case.sprites[0])
        if kind != case.kind:
            failures.append(f"{case.prompt}: {kind}")
    print("\n".join(failures))
    return {
        "subject right": 100 * right / len(singles),
        "background colour right": 100 * colour / len(singles),
        "two subjects on the right sides": 100 * both / len(pairs),
        "motion right": 100 * moved / len(motions),
        "subject right in the middle of a clip": 100 * subject / len(motions),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--shift", type=float, default=None, help="flow shift, else the folder's own")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the prompts to run")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--core", action="store_true", help="prompts from the small vocabulary; references stay all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    table = evaluate(args)
    for name, value in table.items():
        print(f"{name:40s} {value:5.1f} %")
    print(f"{time.monotonic() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
