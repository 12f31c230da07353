"""The caption grammar: noun phrases and the many ways to say one scene.

Everything is lower case without stray punctuation; the tokenizer folds case.
"""

from __future__ import annotations

import random
import re

from train_builtin_model.vocab import BACKGROUND_SYNONYMS, Subject

NUMBERS = {2: ("two", "two", "2", "a pair of"), 3: ("three", "three", "3"), 4: ("four", "four", "4")}
SIZES = {"small": ("small", "small", "little", "tiny"), "big": ("big", "big", "large", "huge")}
FILLERS = ("cute", "nice", "beautiful", "simple", "lovely", "shiny", "happy", "cool")
# Synonyms that take no article although their noun does.
BARE = frozenset(
    ("rain", "snow", "lightning", "milk", "coffee", "soda", "luggage", "cutlery", "yarn", "thread", "dynamite", "wood",
     "bricks", "books", "custard", "lips", "headphones", "ramen", "stew")
)  # fmt: skip
PREFIXES = (
    "a picture of", "an image of", "a photo of", "a drawing of", "an illustration of", "an emoji of", "an icon of",
    "show me", "draw",
)  # fmt: skip
VIDEO_PREFIXES = ("a video of", "an animation of", "a clip of", "a movie of")
ON_BACKGROUND = (
    "on a {} background", "on a {} background", "on a {} background", "with a {} background", "against a {} background",
    "in front of a {} background", "on {}", "on a plain {} background", ", {} background",
)  # fmt: skip
PLACES = {
    "left": ("on the left", "on the left side", "at the left", "to the left", "on the left edge"),
    "right": ("on the right", "on the right side", "at the right", "to the right", "on the right edge"),
    "top": ("at the top", "on top", "near the top", "in the upper part"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part"),
    "center": ("in the center", "in the middle", "at the center", "in the centre"),
    "top left": ("in the top left corner", "in the upper left corner", "at the top left"),
    "top right": ("in the top right corner", "in the upper right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "in the lower left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "in the lower right corner", "at the bottom right"),
}
# {a} and {b}: first and second noun phrase; which side each is on is fixed by the key.
RELATIONS = {
    "a left of b": (
        "{a} to the left of {b}", "{a} to the left of {b}", "{a} left of {b}", "{a} on the left of {b}",
        "{a} on the left and {b} on the right", "{a} and {b}", "{a} next to {b}", "{a} beside {b}",
    ),
    "a right of b": (
        "{a} to the right of {b}", "{a} to the right of {b}", "{a} right of {b}", "{a} on the right of {b}",
        "{a} on the right and {b} on the left",
    ),
    "a above b": (
        "{a} above {b}", "{a} above {b}", "{a} over {b}", "{a} on top of {b}", "{a} at the top and {b} at the bottom",
    ),
    "a below b": (
        "{a} below {b}", "{a} below {b}", "{a} under {b}", "{a} underneath {b}", "{a} beneath {b}",
        "{a} at the bottom and {b} at the top",
    ),
}  # fmt: skip
MOTIONS = {
    "left": (
        "moving left", "moving left", "moving to the left", "going left", "sliding left", "moving from right to left",
    ),
    "right": (
        "moving right", "moving right", "moving to the right", "going right", "sliding right",
        "moving from left to right",
    ),
    "up": ("moving up", "moving up", "moving upwards", "going up", "rising", "flying up"),
    "down": ("moving down", "moving down", "moving downwards", "going down", "falling", "falling down"),
    "grow": ("growing", "growing", "growing bigger", "getting bigger", "getting larger"),
    "shrink": ("shrinking", "shrinking", "getting smaller", "becoming smaller"),
    "rotate": ("rotating", "rotating", "spinning", "spinning around", "turning around"),
    "bounce": ("bouncing", "bouncing", "bouncing up and down", "jumping", "jumping up and down"),
}  # fmt: skip
STILL = ("", "", "", "standing still", "not moving")


def article(phrase: str) -> str:
    """The article "a" or "an", by sound as far as this vocabulary needs it ("a unicorn", "an hourglass")."""
    if re.match(r"(uni|u[^aeiou]e|ufo|euro|one)", phrase):
        return "a"
    return "an" if re.match(r"([aeiou]|hour)", phrase) else "a"


def noun_phrase(
    rng: random.Random, subject: Subject, *, colour: str | None = None, size: str | None = None, count: int = 1
) -> str:
    """Such as "a small red apple", "two kites", "some bread". A count above 1 needs a countable subject."""
    adjectives = [rng.choice(SIZES[size])] if size else []
    if rng.random() < 0.04:
        adjectives.append(rng.choice(FILLERS))
    if colour:
        adjectives.append(colour)
    if count > 1:
        if subject.mass:
            raise ValueError(f"{subject.noun!r} cannot be counted")
        return " ".join([rng.choice(NUMBERS[count]), *adjectives, subject.plural])
    if subject.mass:
        noun = rng.choice((subject.noun, subject.noun, *subject.synonyms))
        return " ".join([*(["some"] if noun == subject.noun and rng.random() < 0.2 else []), *adjectives, noun])
    noun = rng.choice((subject.noun, subject.noun, *subject.synonyms))
    words = " ".join([*adjectives, noun])
    draw = rng.random()
    if draw < 0.06 or noun in BARE:
        return words
    return f"the {words}" if draw < 0.10 else f"{article(words)} {words}"


def background_phrase(rng: random.Random, colour: str) -> str:
    """Such as "on a blue background"."""
    name = rng.choice((colour, colour, colour, *BACKGROUND_SYNONYMS.get(colour, ())))
    text = rng.choice(ON_BACKGROUND).format(name)
    return re.sub(r"\ba(?= [aeiou])", "an", text)


def sentence(rng: random.Random, core: str, background: str | None, *, video: bool) -> str:
    """Join the parts, sometimes with a prefix or a full stop; the background may come first."""
    text = core
    if background:
        phrase = background_phrase(rng, background)
        if rng.random() < 0.06 and phrase.startswith("on a") and phrase.endswith("background"):
            text = f"{phrase}, {core}"
        else:
            text = f"{core}{phrase}" if phrase.startswith(",") else f"{core} {phrase}"
    if rng.random() < 0.14:
        prefixes = PREFIXES + VIDEO_PREFIXES * 2 if video else PREFIXES
        text = f"{rng.choice(prefixes)} {text}"
    return text + ("." if rng.random() < 0.08 else "")


def all_words() -> set[str]:
    """Every word that the templates of this module can produce, apart from nouns and colours."""
    groups: list[tuple[str, ...]] = [
        FILLERS, PREFIXES, VIDEO_PREFIXES, ON_BACKGROUND, STILL, ("a", "an", "the", "some", "background"),
        *NUMBERS.values(), *SIZES.values(), *PLACES.values(), *RELATIONS.values(), *MOTIONS.values(),
    ]  # fmt: skip
    return set(re.findall(r"[a-z0-9]+", " ".join(" ".join(g) for g in groups).replace("{a}", " ").replace("{b}", " ")))
