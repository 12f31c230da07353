"""The data of the built-in model: grammar, scenes, tokens, and the shipped vocabulary file."""

from __future__ import annotations

import copy
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


@pytest.fixture
def denoiser(load: Any) -> Any:
    import torch

    torch.manual_seed(0)
    models, module = load("models"), load("denoiser")
    model = module.Denoiser(models.make_text_encoder(300), models.make_transformer())
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.use_training_attention(31)
    return model


def _batch(load: Any) -> Any:
    """A ring of 8 random scenes of 5 frames."""
    import torch

    ring = load("bank").LatentRing(8, 2, torch.device("cpu"))
    ids = torch.randint(3, 300, (8, 31))
    for row, length in enumerate((5, 9, 12, 31, 4, 7, 20, 1)):
        ids[row, length - 1] = 1
        ids[row, length:] = 0
    spans = torch.tensor([[0, 2], [3, 4]]).expand(8, 2, 2)
    ring.add(torch.randn(8, 16, 2, 16, 16), ids, spans, torch.rand(8, 2, 6))
    return ring


def test_the_training_form_of_the_text_encoder_equals_the_published_class(load: Any, denoiser: Any) -> None:
    import torch

    ids = _batch(load).columns[1].long()
    mask = (ids != 0).long()
    with torch.no_grad():
        expected = denoiser.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        got = denoiser.encode_text(ids)
    assert got.shape == (8, 32, 160)
    assert torch.allclose(got[:, :-1], expected, atol=2e-5)
    assert not got[:, -1].any()


def test_one_step_on_static_buffers_equals_a_plain_textbook_step(load: Any, denoiser: Any) -> None:
    """The body of the graph (rows, noise and rates on the device, flat weights) beside loss, backward, clip, AdamW."""
    import torch

    train, update, muon = load("train_dit"), load("update"), load("muon")
    ring, plain = _batch(load), copy.deepcopy(denoiser)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    batch = ring.batch(4, torch.Generator().manual_seed(5))

    updater = update.Updater(denoiser, average, *train.split_parameters(denoiser), 1e-3, 1e-2)
    updater.schedule(0.5, 0.25)
    generator = torch.Generator().manual_seed(5)
    updater.step(train.losses(denoiser, ring.batch(4, generator), generator).sum())

    before = [p.detach().clone() for p in plain.parameters()]
    matrices, others = train.split_parameters(plain)
    generator = torch.Generator().manual_seed(5)
    torch.rand(4, generator=generator)  # the rows
    train.losses(plain, batch, generator).sum().backward()
    torch.nn.utils.clip_grad_norm_(others, 1.0)
    torch.optim.AdamW(others, lr=5e-4, betas=(0.9, 0.98), weight_decay=0.0).step()
    for matrix in matrices:
        assert matrix.grad is not None
        gradient = matrix.grad * (1 - 0.95 * 0.95)  # the first step's momentum, Nesterov's way
        rows, columns = matrix.shape
        step = muon.orthogonalise(gradient[None])[0].float() * max(1.0, rows / columns) ** 0.5
        matrix.data -= 5e-3 * step
    moved = 0.0
    for old, new, wanted, mean in zip(
        before, denoiser.parameters(), plain.parameters(), average.parameters(), strict=True
    ):
        # Newton-Schulz runs in bf16, here one matrix at a time: its results agree to about a hundredth of a step.
        assert (new - wanted).norm() <= 0.03 * (wanted - old).norm() + 1e-6
        assert torch.allclose(mean, old + 0.25 * (new - old), atol=1e-6)
        assert new.grad is None
        moved = max(moved, float((new.detach() - old).abs().max()))
    assert moved > 4e-4


def test_a_rate_of_zero_leaves_the_weights_and_a_reset_forgets_the_moments(load: Any) -> None:
    import torch

    update = load("update")
    torch.manual_seed(1)
    model = torch.nn.Linear(6, 4)
    updater = update.Updater(model, copy.deepcopy(model), [model.weight], [model.bias], 1e-3, 1e-2)
    before = updater.flat.clone()
    updater.schedule(0.0, 0.0)
    updater.step(model(torch.randn(3, 6)).square().sum())
    assert torch.equal(updater.flat, before)
    assert torch.equal(updater.flat_average, before)
    updater.reset()
    moments = [value for state in updater.adam.state.values() for value in state.values()]
    assert moments
    assert not any(bool(value.any()) for value in [*moments, *updater.muon.buffers])


def test_flat_parameters_are_views_and_keep_their_values_and_ties(load: Any, denoiser: Any) -> None:
    import torch

    state = {name: value.clone() for name, value in denoiser.state_dict().items()}
    flat = load("update").flatten_parameters(denoiser)
    assert all(torch.equal(value, state[name]) for name, value in denoiser.state_dict().items())
    flat.zero_()
    assert not any(bool(p.any()) for p in denoiser.parameters())


def test_no_operation_of_a_step_reads_a_value_back(load: Any, denoiser: Any) -> None:
    """What would end the recording of a CUDA graph: item(), nonzero(), boolean indexing."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert not re.search("_local_scalar|nonzero|masked_select|unique|is_nonzero", str(func)), func
            return func(*args, **(kwargs or {}))

    train, ring = load("train_dit"), _batch(load)
    updater = load("update").Updater(denoiser, copy.deepcopy(denoiser), *train.split_parameters(denoiser), 1e-3, 1e-2)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(AssertionError, match="_local_scalar"), Refuse():  # type: ignore[no-untyped-call]
        float(torch.ones(1))
    with Refuse():  # type: ignore[no-untyped-call]
        loss = train.losses(denoiser, ring.batch(2, generator), generator).sum()
        gradients = torch.autograd.grad(loss, updater.parameters)
    for parameter, gradient in zip(updater.parameters, gradients, strict=True):
        parameter.grad = gradient
    with Refuse():  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(updater.others, 1.0)
        updater.muon.step()
        updater.flat_average.lerp_(updater.flat, updater.average_weight)


def test_pictures_are_cut_where_the_grid_of_latents_allows(load: Any) -> None:
    import torch

    ring = load("bank").PixelRing(3, 1, torch.device("cpu"))
    columns = torch.arange(128).expand(3, 3, 1, 128, 128)
    ring.add(
        columns,
    )
    out = ring.batch(16, 64, torch.float32, torch.Generator().manual_seed(0))
    assert out.shape == (16, 3, 1, 64, 64)
    corners = ((out[:, 0, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert len(set(corners)) > 3
    assert all(corner % 8 == 0 and corner <= 64 for corner in corners)
    assert torch.allclose(out[:, :, :, :, 63] - out[:, :, :, :, 0], torch.tensor(63 / 127.5), atol=1e-6)


def test_the_newest_scenes_replace_the_oldest(load: Any) -> None:
    import torch

    ring = load("bank").Ring([torch.zeros(5)])
    for first in (1, 4, 7):
        ring.add(torch.arange(first, first + 3).float())
    assert sorted(ring.columns[0].tolist()) == [5, 6, 7, 8, 9]
    assert float(ring.rows) == 5


def test_scenes_begin_with_single_large_subjects(maker: Any) -> None:
    shares = {}
    for progress in (0.0, 1.0):
        maker.progress = progress
        scenes = [maker.image() for _ in range(1500)]
        singles = [s for s in scenes if s.kind == "single"]
        large = sum(s.objects[0][1][2] > 100 for s in singles) / len(singles)
        shares[progress] = (
            len(singles) / len(scenes),
            large,
            sum(" of " in s.kind or "above" in s.kind or "below" in s.kind for s in scenes) / len(scenes),
        )
    assert shares[0.0][0] == pytest.approx(0.80, abs=0.05)
    assert shares[1.0][0] == pytest.approx(0.46, abs=0.05)
    assert shares[0.0][1] > 1.5 * shares[1.0][1]
    assert shares[1.0][2] == pytest.approx(0.40, abs=0.05)


def test_the_vocabulary_has_the_size_that_was_planned(load: Any) -> None:
    vocabulary = load("vocab").load_vocabulary()
    assert 220 <= len(vocabulary.subjects) <= 280
    assert len(vocabulary.sprites) <= 300
    coloured = {vocabulary.subjects[s.subject].noun for s in vocabulary.sprites if not s.base}
    assert {"apple", "car", "heart", "book", "balloon"} <= coloured


def test_a_machine_without_a_gpu_runs_the_plain_form(load: Any) -> None:
    import torch

    calls: list[int] = []
    runner = load("steps").StepRunner(
        {1: lambda _: calls.append(1), 17: lambda _: calls.append(17)}, lambda on: None, lambda: 0.0,
        torch.device("cpu"), 1,
    )  # fmt: skip
    assert runner.choose(("plain", "graph")) == "plain"
    runner(17)
    assert calls == [17]


def test_the_fastest_form_that_is_right_runs_and_failures_are_left_out(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three stand-ins for a graph: one breaks at another shape, one computes nonsense, one is good but slow."""
    import torch

    steps = load("steps")
    clock, state = [0.0], {"loss": 0.0, "compiled": False}
    monkeypatch.setattr(steps.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))

    def body(seconds: float, loss: float) -> Any:
        def run(generator: Any) -> None:
            clock[0] += seconds
            state["loss"] += loss

        return run

    plain = {1: body(0.08, 2.0), 17: body(0.09, 3.0)}

    def capture(original: Any, generator: Any, pool: Any) -> Any:
        if original is plain[17] and state["compiled"]:
            raise RuntimeError("capture failed")
        return body(0.01 if state["compiled"] else 0.02, 2.0)

    def take_loss() -> float:
        loss, state["loss"] = state["loss"], 0.0
        return loss

    monkeypatch.setattr(steps, "capture", capture)
    make = lambda: steps.StepRunner(  # noqa: E731
        plain, lambda on: state.update(compiled=on), take_loss, torch.device("cpu"), 1
    )
    runner = make()  # type: ignore[no-untyped-call]
    assert runner.choose(steps.DEFAULT_FORMS) == "graph"
    assert "capture failed" in capsys.readouterr().out
    runner(17)
    assert take_loss() == 2.0

    monkeypatch.setattr(steps, "capture", lambda *_: body(0.001, float("nan")))
    runner = make()  # type: ignore[no-untyped-call]
    assert runner.choose(steps.DEFAULT_FORMS) == "plain"
    assert "WRONG" in capsys.readouterr().out
    runner(17)
    assert take_loss() == 3.0


def test_a_checkpoint_leaves_no_shard_of_an_earlier_larger_one(load: Any, tmp_path: Path) -> None:
    import torch

    checkpoint = load("checkpoint")
    checkpoint.SHARD_BYTES, usual = 64, checkpoint.SHARD_BYTES
    try:
        checkpoint.save_checkpoint(tmp_path, "dit", {str(i): torch.full((16,), 1.0) for i in range(3)}, {})
        assert len(list(tmp_path.glob("dit-*.safetensors"))) == 3
        checkpoint.save_checkpoint(tmp_path, "dit", {str(i): torch.full((4,), 2.0) for i in range(3)}, {"steps": 4})
    finally:
        checkpoint.SHARD_BYTES = usual
    tensors, meta = checkpoint.load_checkpoint(tmp_path, "dit")
    assert meta == {"steps": 4}
    assert all(torch.equal(t, torch.full((4,), 2.0)) for t in tensors.values())


def test_a_step_of_the_autoencoder_equals_a_textbook_step_whatever_the_layout_of_gradients(load: Any) -> None:
    import torch

    torch.manual_seed(2)
    train, models, clip_vae = load("train_vae"), load("models"), load("clip_vae")
    vae, video = models.make_vae(), torch.rand(1, 3, 5, 16, 16) * 2 - 1
    plain = copy.deepcopy(vae)

    def loss(model: Any) -> Any:
        form = clip_vae.ClipVae(model, fuse=False)
        return sum(train.reconstruction_loss(form.decode(form.encode(v)[0]), v) for v in (video, video[:, :, :1]))

    filters, others = train.split_parameters(vae)
    updater = load("update").Updater(vae, copy.deepcopy(vae), filters, others, 1e-3, 1e-2)
    updater.schedule(1.0, 0.1)
    updater.step(loss(vae))
    assert all(place.stride() == p.stride() for place, p in zip(updater.gradients, updater.parameters, strict=True))
    _, others = train.split_parameters(plain)
    loss(plain).backward()
    torch.nn.utils.clip_grad_norm_(others, 1.0)
    torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0).step()
    for new, wanted in zip(updater.others, others, strict=True):
        assert torch.allclose(new, wanted, atol=2e-5)


def test_mentions_point_at_the_words_that_name_an_object(load: Any, maker: Any) -> None:
    loader = load("loader")
    tokenizer = load("tokenizer").build_tokenizer(maker.vocabulary)
    scenes = [make() for make in (maker.single, maker.pair, maker.counted, lambda: maker.moving(17)) for _ in range(60)]
    captions = tokenizer([s.caption for s in scenes])["input_ids"]
    phrases = [t[:-1] for t in tokenizer([p for s in scenes for p, _ in s.mentions])["input_ids"]]
    spans, places = loader.pack_mentions(scenes, captions, phrases)
    following = iter(phrases)
    for scene, tokens, span, place in zip(scenes, captions, spans.tolist(), places.tolist(), strict=True):
        for k, (_, index) in enumerate(scene.mentions):
            assert tokens[span[k][0] : span[k][1]] == next(following)
            assert place[k][0] * 32 + 64 == pytest.approx(scene.objects[index][1][0], abs=1e-3)
        assert all(first == end for first, end in span[len(scene.mentions) :])
    assert [len(s.mentions) for s in scenes[::60]] == [1, 2, 0, 1]


def test_the_layout_loss_sees_only_the_words_of_mentions_and_no_dropped_caption(load: Any) -> None:
    import torch

    loss = load("denoiser").layout_loss
    ids = torch.tensor([[5, 6, 7, 1, 0], [1, 0, 0, 0, 0]])
    spans = torch.tensor([[[0, 2], [0, 0]], [[0, 2], [2, 4]]])
    places = torch.zeros(2, 2, 6)
    layout = torch.zeros(2, 5, 6)
    layout[0, 2:] = 9.0
    layout[1] = 9.0
    assert float(loss(layout, ids, spans, places)) == 0.0
    layout[0, 1] = 2.0
    assert float(loss(layout, ids, spans, places)) == pytest.approx(2.0)


def test_the_first_heads_of_a_new_text_encoder_look_to_one_side(load: Any) -> None:
    import torch

    models = load("models")
    encoder = models.make_text_encoder(300)
    models.initialise_text_encoder(encoder)
    for block in encoder.encoder.block:
        bias = block.layer[0].SelfAttention.compute_bias(9, 9)[0].detach()  # (heads, query, key)
        right = torch.ones(9, 9).triu(1).bool()
        for head, masked in ((0, right), (1, ~right), (2, right), (3, ~right)):
            assert float(bias[head][masked].max()) < float(bias[head][~masked].min()) - 2.0


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(load: Any) -> None:
    import torch

    update = load("update")
    torch.manual_seed(1)
    model = torch.nn.Linear(6, 4)
    updater = update.Updater(model, copy.deepcopy(model), [model.weight], [model.bias], 1e-3, 1e-2)
    updater.schedule(1.0, 0.5)
    before = updater.flat.clone()
    updater.step(model(torch.full((3, 6), torch.inf)).square().sum())
    assert torch.equal(updater.flat, before)
    assert int(updater.skipped) == 1
    updater.step(model(torch.randn(3, 6)).square().sum())
    assert not torch.equal(updater.flat, before)
    assert bool(updater.flat.isfinite().all())
    with pytest.raises(FloatingPointError, match="start this part again"):
        update.check_finite("vae", float("nan"))
