"""Random scenes: what is where, how it moves, and a caption that says so. No torch here; runs in loader workers.

A scene is up to four objects on a plain background. Each object has ten numbers:
x0, y0, size0, angle0 at the first frame; x1, y1, size1, angle1 at the last; bounce height; number of bounces
(pixels of the 128x128 frame, radians). Positions in between are linear, less height * |sin(pi * bounces * u)|.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train_builtin_model import captions
from train_builtin_model.vocab import BACKGROUNDS, Vocabulary

MAX_OBJECTS = 4
LENGTHS = (17, 13, 9, 5)
LENGTH_WEIGHTS = (0.64, 0.12, 0.12, 0.12)
PLACE_CENTRES = {
    "left": (32, 64), "right": (96, 64), "top": (64, 32), "bottom": (64, 96), "center": (64, 64),
    "top left": (31, 31), "top right": (97, 31), "bottom left": (31, 97), "bottom right": (97, 97),
}  # fmt: skip
CLASH = 0.35  # share of the rim near the background colour above which a glyph is hard to see
Object = tuple[int, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Scene:
    """objects: (sprite, ten numbers) each; background: its name; kind: what an evaluation may check.

    mentions: the noun phrases that name one object each, in the caption's order, with the object's number.
    """

    caption: str
    objects: tuple[Object, ...]
    background: str
    kind: str
    background_named: bool
    mentions: tuple[tuple[str, int], ...] = ()


def _still(x: float, y: float, size: float) -> tuple[float, ...]:
    return (x, y, size, 0.0, x, y, size, 0.0, 0.0, 0.0)


class SceneMaker:
    """Draws scenes from a seeded generator. clash: (sprites, backgrounds) of the sprite file; only: which sprites.

    `progress`, from 0 to 1, makes the curriculum: first mostly single and large subjects, then all kinds of scene.
    """

    def __init__(
        self, vocabulary: Vocabulary, clash: NDArray[np.float32], seed: int, only: frozenset[int] | None = None
    ) -> None:
        self.vocabulary, self.progress = vocabulary, 1.0
        self.rng = random.Random(seed)
        self.names = list(BACKGROUNDS)
        self.clear = [[n for j, n in enumerate(self.names) if row[j] < CLASH] or ["white"] for row in clash]
        families = [vocabulary.sprites_of(i) for i in range(len(vocabulary.subjects))]
        kept = ([s for s in family if only is None or s in only] for family in families)
        self.by_subject = [family for family in kept if family]
        self.family_size = {s: len(family) for family in self.by_subject for s in family}

    def sprite(self, countable: bool = False) -> int:
        """A sprite: subjects evenly, the base picture of a subject with colours half of the time."""
        while True:
            own = self.rng.choice(self.by_subject)
            if countable and self.vocabulary.subjects[self.vocabulary.sprites[own[0]].subject].mass:
                continue
            # Coloured families are drawn more often, as they have up to ten pictures to learn.
            if len(own) == 1 and self.rng.random() < 0.25:
                continue
            return own[0] if len(own) == 1 or self.rng.random() < 0.3 else self.rng.choice(own)

    def phrase(self, sprite: int, size: str | None = None, count: int = 1) -> str:
        """The noun phrase for a sprite; pictures that are not the base one always name their colour."""
        entry = self.vocabulary.sprites[sprite]
        own = self.family_size[sprite]
        named = not entry.base or (entry.colour is not None and self.rng.random() < (0.5 if own > 1 else 0.25))
        subject = self.vocabulary.subjects[entry.subject]
        return captions.noun_phrase(self.rng, subject, colour=entry.colour if named else None, size=size, count=count)

    def background(self, sprites: list[int], named: bool) -> str:
        """A colour on which all sprites can be seen; white more often where the caption leaves it open."""
        if named and self.rng.random() < 0.05:
            return self.rng.choice(self.names)
        choices = [n for n in self.clear[sprites[0]] if all(n in self.clear[s] for s in sprites[1:])] or self.names
        if not named and "white" in choices and self.rng.random() < 0.3:
            return "white"
        return self.rng.choice(choices)

    def _finish(
        self, core: str, objects: list[Object], kind: str, video: bool, mentions: tuple[str, ...] = ()
    ) -> Scene:
        named = self.rng.random() < 0.65
        colour = self.background([sprite for sprite, _ in objects], named)
        caption = captions.sentence(self.rng, core, colour if named else None, video=video)
        numbered = tuple((phrase, index) for index, phrase in enumerate(mentions))
        return Scene(caption, tuple(objects), colour, kind, named, numbered)

    def jitter(self, value: float, spread: float = 4.0) -> float:
        """value, moved evenly by at most `spread`."""
        return value + self.rng.uniform(-spread, spread)

    def single(self, video: bool = False) -> Scene:
        """One subject, perhaps with a place and a size."""
        rng, sprite = self.rng, self.sprite()
        early = max(0.0, 1.0 - 2.0 * self.progress)  # falls to 0 at half time
        size = rng.choices((None, "small", "big"), (0.60, 0.18 * (1 - early), 0.22 + 0.3 * early))[0]
        place = rng.choice(list(PLACE_CENTRES)) if rng.random() < 0.36 * (1 - early) and size != "big" else None
        x, y = PLACE_CENTRES[place or "center"]
        if size == "small":
            pixels = rng.uniform(28, 36)
        elif size == "big":
            pixels = rng.uniform(104, 116)
        else:
            pixels = rng.uniform(48, 56) if place and place != "center" else rng.uniform(70, 88)
        core = phrase = self.phrase(sprite, size)
        if place:
            core += " " + rng.choice(captions.PLACES[place])
        if video and rng.random() < 0.5:
            core = f"{core} {rng.choice(captions.STILL)}".strip()
        where = _still(self.jitter(x, 3), self.jitter(y, 3), pixels)
        return self._finish(core, [(sprite, where)], "single", video, (phrase,))

    def counted(self, video: bool = False) -> Scene:
        """Two, three or four of one subject."""
        rng, sprite, count = self.rng, self.sprite(countable=True), self.rng.choice((2, 3, 4))
        core = self.phrase(sprite, count=count)
        if count == 4:
            spots, pixels = [(35, 35), (93, 35), (35, 93), (93, 93)], rng.uniform(46, 52)
        else:
            spots = [(34, 64), (94, 64)] if count == 2 else [(23, 64), (64, 64), (105, 64)]
            pixels = rng.uniform(48, 54) if count == 2 else rng.uniform(36, 40)
        dx, dy = rng.uniform(-2, 2), rng.uniform(-6, 6) if count < 4 else rng.uniform(-2, 2)
        return self._finish(core, [(sprite, _still(x + dx, y + dy, pixels)) for x, y in spots], f"count {count}", video)

    def pair(self, video: bool = False) -> Scene:
        """Two subjects, beside or above each other."""
        rng, a, b = self.rng, self.sprite(), self.sprite()
        relation = rng.choice(list(captions.RELATIONS))
        first_phrase, second_phrase = self.phrase(a), self.phrase(b)
        core = rng.choice(captions.RELATIONS[relation]).format(a=first_phrase, b=second_phrase)
        near, far = (33.0, 95.0)
        first = near if relation in ("a left of b", "a above b") else far
        pixels, drift = rng.uniform(48, 56), rng.uniform(-5, 5)
        objects: list[Object] = []
        for sprite, along in ((a, first), (b, near + far - first)):
            along = self.jitter(along, 2)
            x, y = (64 + drift, along) if "above" in relation or "below" in relation else (along, 64 + drift)
            objects.append((sprite, _still(x, y, pixels)))
        return self._finish(core, objects, relation, video, (first_phrase, second_phrase))

    def moving(self, frames: int) -> Scene:
        """One subject with one kind of motion; shorter clips move less far."""
        rng, sprite = self.rng, self.sprite()
        kind = rng.choice(list(captions.MOTIONS))
        reach = 0.4 + 0.6 * (frames - 1) / 16
        phrase = self.phrase(sprite)
        core = f"{phrase} {rng.choice(captions.MOTIONS[kind])}"
        return self._finish(core, [(sprite, motion_path(rng, kind, reach, frames))], f"motion {kind}", True, (phrase,))

    def image(self) -> Scene:
        """A scene for one frame: at first four of five with one subject, from half time on 46 %, and 40 % pairs."""
        draw, single = self.rng.random(), 0.80 - 0.34 * min(1.0, 2.0 * self.progress)
        if draw < single:
            return self.single()
        return self.pair() if draw < single + 0.74 * (1 - single) else self.counted()

    def video(self, frames: int) -> Scene:
        """A scene for several frames, most of them with motion."""
        draw = self.rng.random()
        if draw < 0.78:
            return self.moving(frames)
        return self.single(True) if draw < 0.90 else self.pair(True) if draw < 0.96 else self.counted(True)


def motion_path(rng: random.Random, kind: str, reach: float, frames: int) -> tuple[float, ...]:
    """The ten numbers of a motion; reach: 1 for 17 frames, less for shorter clips."""
    size, x, y = rng.uniform(44, 58), rng.uniform(58, 70), rng.uniform(58, 70)
    travel = 32.0 * reach
    if kind in ("left", "right"):
        sign = -1.0 if kind == "left" else 1.0
        return (64 - sign * travel, y, size, 0.0, 64 + sign * travel, y, size, 0.0, 0.0, 0.0)
    if kind in ("up", "down"):
        sign = -1.0 if kind == "up" else 1.0
        return (x, 64 - sign * travel, size, 0.0, x, 64 + sign * travel, size, 0.0, 0.0, 0.0)
    if kind in ("grow", "shrink"):
        small, large = 68 - 36 * reach, 68 + 36 * reach
        first, last = (small, large) if kind == "grow" else (large, small)
        return (64.0, 64.0, first, 0.0, 64.0, 64.0, last, 0.0, 0.0, 0.0)
    if kind == "rotate":
        size = rng.uniform(62, 78)
        return (64.0, 64.0, size, 0.0, 64.0, 64.0, size, math.radians(240.0) * (frames - 1) / 16, 0.0, 0.0)
    assert kind == "bounce", kind
    bounces = 2.0 if frames >= 13 else 1.0
    return (x, 92.0, size, 0.0, x, 92.0, size, 0.0, 54.0 * reach, bounces)
