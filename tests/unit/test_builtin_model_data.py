"""The data of the built-in model: grammar, scenes, tokens, and the shipped vocabulary file."""

from __future__ import annotations

import importlib
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runtime" / "models" / "builtin_model"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the training scripts by its short name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return lambda name: importlib.import_module(f"train_builtin_model.{name}")


@pytest.fixture
def maker(load: Any) -> Any:
    vocabulary = load("vocab").load_vocabulary()
    clash = np.zeros((len(vocabulary.sprites), len(load("vocab").BACKGROUNDS)), np.float32)
    return load("scenes").SceneMaker(vocabulary, clash, 3)


@pytest.mark.parametrize(
    ("phrase", "article"),
    [
        ("apple", "an"),
        ("unicorn", "a"),
        ("umbrella", "an"),
        ("ufo", "a"),
        ("hourglass", "an"),
        ("house", "a"),
        ("orange car", "an"),
    ],
)
def test_the_article_follows_the_sound(load: Any, phrase: str, article: str) -> None:
    assert load("captions").article(phrase) == article


@pytest.mark.parametrize(
    ("noun", "plural"),
    [("apple", "apples"), ("strawberry", "strawberries"), ("key", "keys"), ("fox", "foxes"), ("torch", "torches")],
)
def test_regular_plurals(load: Any, noun: str, plural: str) -> None:
    assert load("vocab").pluralise(noun) == plural


def test_a_mass_noun_cannot_be_counted(load: Any) -> None:
    subject = load("vocab").Subject("bread", "breads", (), True)
    with pytest.raises(ValueError, match="cannot be counted"):
        load("captions").noun_phrase(random.Random(0), subject, count=2)


def test_captions_have_right_articles_and_no_holes(maker: Any) -> None:
    for _ in range(3000):
        caption = maker.image().caption
        assert not re.search(r"[{}]|  |^ | $", caption), caption
        assert not re.search(r"\ba (apple|orange|elephant|igloo|umbrella|owl)\b", caption), caption
        assert not re.search(r"\ban [bcdfgjklmnpqrstvwxyz]", caption), caption


def test_colours_are_drawn_only_for_subjects_that_have_them(load: Any) -> None:
    vocabulary = load("vocab").load_vocabulary()
    for index in range(len(vocabulary.subjects)):
        sprites = [vocabulary.sprites[i] for i in vocabulary.sprites_of(index)]
        assert [s.base for s in sprites] == [True] + [False] * (len(sprites) - 1)
        named = [s.colour for s in sprites if s.colour]
        assert len(named) == len(set(named)), vocabulary.subjects[index].noun


def test_motion_goes_the_way_its_name_says(load: Any) -> None:
    rng = random.Random(1)
    path = load("scenes").motion_path
    assert path(rng, "left", 1.0, 17)[4] < path(rng, "left", 1.0, 17)[0]
    assert path(rng, "up", 1.0, 17)[5] < path(rng, "up", 1.0, 17)[1]
    assert path(rng, "grow", 1.0, 17)[6] > path(rng, "grow", 1.0, 17)[2]
    assert path(rng, "rotate", 1.0, 17)[7] == pytest.approx(math.radians(240))
    assert path(rng, "bounce", 1.0, 17)[8] > 0


def test_every_caption_fits_the_tokens_and_needs_no_single_characters(load: Any, maker: Any) -> None:
    tokenizer = load("tokenizer").build_tokenizer(maker.vocabulary)
    captions = [maker.image().caption for _ in range(500)] + [maker.video(17).caption for _ in range(500)]
    for caption, ids in zip(captions, tokenizer(captions)["input_ids"], strict=True):
        assert len(ids) <= load("loader").CAPTION_TOKENS
        pieces = tokenizer.convert_ids_to_tokens(ids[:-1])
        assert all(piece.startswith("\u2581") or piece in ",." for piece in pieces), (caption, pieces)


def test_the_tokenizer_folds_case_and_survives_any_text(load: Any, maker: Any) -> None:
    tokenizer = load("tokenizer").build_tokenizer(maker.vocabulary)
    assert tokenizer("A Red APPLE")["input_ids"] == tokenizer("a red apple")["input_ids"]
    for text in ("", "\u732b \U0001f600 \x00", "x" * 3000, "\u202e\u0301"):
        assert tokenizer(text)["input_ids"][-1] == 1


def test_the_compositor_puts_a_glyph_where_the_scene_says(load: Any) -> None:
    import torch

    compose, scenes = load("compose"), load("scenes")
    rgba = np.full((1, 128, 128, 4), 255, np.uint8)
    compositor = compose.Compositor(rgba, torch.device("cpu"), torch.float32)
    numbers = (32.0, 64.0, 32.0, 0.0, 96.0, 64.0, 32.0, 0.0, 0.0, 0.0)
    scene = scenes.Scene("", ((0, numbers),), "black", "", True)
    clip = compositor.render(compose.pack_scenes([scene], np.random.default_rng(0)), 5)
    assert clip.shape == (1, 3, 5, 128, 128)
    white = clip[0, 0] > 0.5
    columns = [float(frame.any(0).nonzero().double().mean()) for frame in white]
    assert columns == pytest.approx([31.5, 47.5, 63.5, 79.5, 95.5], abs=0.6)


def test_the_shipped_vocabulary_file_is_that_of_the_scripts(load: Any) -> None:
    shipped = json.loads((FOLDER / "vocabulary.json").read_text(encoding="utf-8"))
    assert shipped["words"] == sorted(shipped["words"])
    assert {"a", "apple", "moving", "background"} <= set(shipped["words"])
    assert "light blue" in shipped["colours"]
    assert "race car" in shipped["subjects"]
    tokenizer = json.loads((FOLDER / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = {piece for piece, _ in tokenizer["model"]["vocab"]}
    words = load("tokenizer").vocabulary_words(load("vocab").load_vocabulary())
    assert all("\u2581" + word in pieces for word in words)
