"""The vocabulary: which glyphs the model learns, what captions call them, and the named colours.

`subjects.txt` is the only source. A *subject* is what a caption names ("apple"); a *sprite* is one picture of it
("apple" in red, "apple" in green). The first sprite of a subject is what its bare name means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CORE_FILE = Path(__file__).with_name("core_subjects.txt")
SUBJECTS_FILE = Path(__file__).with_name("subjects.txt")

Colour = tuple[int, int, int]

# Background colours: far enough apart that the nearest one names what a picture shows.
BACKGROUNDS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 212, 50),
    "green": (60, 170, 80),
    "blue": (45, 105, 220),
    "light blue": (150, 205, 245),
    "dark blue": (20, 35, 95),
    "purple": (130, 65, 190),
    "pink": (245, 150, 190),
    "brown": (125, 80, 45),
    "gray": (140, 140, 145),
    "light green": (175, 232, 160),
    "dark green": (18, 82, 45),
    "teal": (28, 172, 168),
    "beige": (240, 224, 190),
    "black": (15, 15, 18),
    "white": (250, 250, 250),
}
BACKGROUND_SYNONYMS: dict[str, tuple[str, ...]] = {
    "light blue": ("sky blue", "pale blue"),
    "dark blue": ("navy", "navy blue"),
    "purple": ("violet",),
    "gray": ("grey",),
    "light green": ("pale green",),
    "teal": ("turquoise", "cyan"),
    "beige": ("cream",),
}
# Sprite colours that recolourable subjects are rendered in: (hue in degrees, median saturation, median value).
# Black and white keep the shading and drop the saturation.
RECOLOURS: dict[str, tuple[float, float, float]] = {
    "red": (2.0, 0.82, 0.85),
    "orange": (28.0, 0.88, 0.97),
    "yellow": (50.0, 0.80, 0.98),
    "green": (128.0, 0.66, 0.66),
    "blue": (216.0, 0.74, 0.86),
    "purple": (276.0, 0.60, 0.72),
    "pink": (334.0, 0.46, 0.98),
    "black": (0.0, 0.0, 0.20),
    "white": (0.0, 0.0, 0.95),
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What a caption names. `mass` nouns ("bread", "scissors") take no article and are never counted."""

    noun: str
    plural: str
    synonyms: tuple[str, ...]
    mass: bool


@dataclass(frozen=True, slots=True)
class Sprite:
    """One picture: a glyph, of `subjects[subject]`, with the colour that captions may name.

    `base` marks the first sprite of its subject; `recoloured` those whose hue is changed after rendering.
    """

    glyph: str
    subject: int
    colour: str | None
    base: bool
    recoloured: bool


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All subjects and all sprites, in the order of the sprite file."""

    subjects: tuple[Subject, ...]
    sprites: tuple[Sprite, ...]

    def sprites_of(self, subject: int) -> list[int]:
        """Indices of the sprites that show `subject`, base first."""
        return [i for i, sprite in enumerate(self.sprites) if sprite.subject == subject]


def pluralise(noun: str) -> str:
    """The regular English plural of the last word ("box of chocolate" and the like have `pl:` in the file)."""
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun + "s"


def _parse_flags(text: str, noun: str) -> tuple[bool, str | None, tuple[str, ...], str]:
    """-> (mass, colour, colours it is rendered in as well, plural). `pl:` takes words up to the next flag."""
    mass = bool(re.search(r"(^|\s)m(\s|$)", re.sub(r"pl:[^:]*$", "", text)))
    found = re.search(r"(^|\s)c:(\w+)((?:/\w+)*)", text)
    plural = re.search(r"pl:(.+?)(?=\sc:|$)", text)
    return (
        mass,
        found.group(2) if found else None,
        tuple(found.group(3).split("/")[1:]) if found else (),
        plural.group(1).strip() if plural else pluralise(noun),
    )


def load_vocabulary(path: Path = SUBJECTS_FILE) -> Vocabulary:
    """Parse the subject file. Sprites: first all glyphs in file order, then the recoloured ones."""
    subjects: list[Subject] = []
    sprites: list[Sprite] = []
    recoloured: list[Sprite] = []
    index: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        glyph, noun, synonyms, flags = (part.strip() for part in line.split(";"))
        mass, colour, others, plural = _parse_flags(flags, noun)
        if noun.startswith("@"):
            sprites.append(Sprite(glyph, index[noun[1:]], colour, base=False, recoloured=False))
            continue
        if noun in index:
            raise ValueError(f"{path.name}: the noun {noun!r} is given twice; write @{noun} for another colour of it")
        index[noun] = len(subjects)
        subjects.append(Subject(noun, plural, tuple(s.strip() for s in synonyms.split(",") if s.strip()), mass))
        sprites.append(Sprite(glyph, index[noun], colour, base=True, recoloured=False))
        recoloured += [Sprite(glyph, index[noun], c, base=False, recoloured=True) for c in others]
    return Vocabulary(tuple(subjects), tuple(sprites + recoloured))


def core_sprites(vocabulary: Vocabulary, path: Path = CORE_FILE) -> frozenset[int]:
    """The sprites of a small vocabulary, for training without a GPU. Lines: noun, or noun: colours."""
    chosen: set[int] = set()
    nouns = {subject.noun: i for i, subject in enumerate(vocabulary.subjects)}
    for line in path.read_text(encoding="utf-8").splitlines():
        noun, _, colours = line.partition(":")
        for index in vocabulary.sprites_of(nouns[noun.strip()]):
            sprite = vocabulary.sprites[index]
            if (sprite.colour in colours.split()) if colours else sprite.base:
                chosen.add(index)
    return frozenset(chosen)
