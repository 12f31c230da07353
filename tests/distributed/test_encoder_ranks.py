"""A text encoder shared by 2, 3 and 4 gloo processes against one process: matrices, prompts, and both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_processes import module, run_ranks
from safetensors.torch import load_file
from torch import Tensor

from safelight.runtime.errors import ModelError
from safelight.runtime.models.encoders import shared_decoder
from safelight.runtime.models.encoders.umt5 import load_umt5
from safelight.runtime.parallel.mesh import ParallelMesh

TOLERANCE = 1e-5
RANKS = Path(__file__).with_name("encoder_ranks.py")
PROGRAM = module(RANKS)
WAYS = [(world, *way) for world in (2, 3, 4) for way in PROGRAM.ways(world)]
CASES = [(*way, heads) for way in WAYS for heads, count in PROGRAM.HEADS.items() if way[1] <= count]
Results = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    PROGRAM.make(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(models: Path) -> Results:
    torch.set_num_threads(1)
    results: Results = {}
    with torch.inference_mode():
        for name in PROGRAM.HEADS:
            encoder = PROGRAM.load(models / name, ParallelMesh.single())
            results |= PROGRAM.encoded(encoder, name)
            results[f"{name} weights"] = torch.tensor(PROGRAM.weights(encoder, ""))
            results[f"{name} replicated"] = torch.tensor(PROGRAM.weights(encoder, "norm", "vision."))
    return results


@pytest.fixture(scope="module")
def ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Results]]:
    """By number of ranks, every rank's results."""
    found = {}
    for world in (2, 3, 4):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        run_ranks(RANKS, world, folder, models, folder)
        found[world] = [load_file(folder / f"{rank}.safetensors") for rank in range(world)]
    return found


@pytest.mark.parametrize(("world", "tp", "sets", "heads"), CASES)
def test_every_rank_has_the_embeddings_of_one_rank(
    one_rank: Results, ranks: dict[int, list[Results]], world: int, tp: int, sets: int, heads: str
) -> None:
    for name, prompts in PROGRAM.PROMPTS.items():
        for number in range(len(prompts)):
            key = f"{heads} {name} {number}"
            alone, made = one_rank[key], [result[f"{tp}x{sets} {key}"] for result in ranks[world]]
            assert alone.std() > 0.1
            assert all(torch.equal(row, made[0]) for row in made)
            assert made[0].shape == alone.shape
            assert (made[0] - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("world", "tp", "sets", "name"), [case for case in CASES if case[1] > 1])
def test_each_rank_holds_its_share_of_the_weights(
    one_rank: Results, ranks: dict[int, list[Results]], world: int, tp: int, sets: int, name: str
) -> None:
    whole, replicated = int(one_rank[f"{name} weights"]), int(one_rank[f"{name} replicated"])
    held = [int(result[f"{tp}x{sets} {name} weights"]) for result in ranks[world]]
    assert sum(held) == (whole + (tp - 1) * replicated) * (world // tp)
    shares = -(-PROGRAM.HEADS[name] // tp) / PROGRAM.HEADS[name]
    assert max(held) < 1.1 * (whole - replicated) * shares + replicated


@pytest.mark.parametrize("control", ["unsummed heads12", "unsummed qwen2.5-vl", "unsummed qwen3", "swapped heads12"])
def test_what_the_ranks_must_add_up_shows_when_it_is_wrong(
    one_rank: Results, ranks: dict[int, list[Results]], control: str
) -> None:
    alone = one_rank[f"{control.split()[1]} guided 0"]
    assert (ranks[2][0][f"2x1 {control}"] - alone).abs().max() > 50 * TOLERANCE


def test_the_prompts_differ_by_more_than_the_tolerance(one_rank: Results) -> None:
    first, second = one_rank["heads3 guided 0"], one_rank["heads3 guided 1"]
    assert (first[-1] - second[-1]).abs().max() > 50 * TOLERANCE


def test_an_encoder_whose_config_says_other_sizes_is_refused_by_name(models: Path, tmp_path: Path) -> None:
    config = (models / "heads3" / "config.json").read_text()
    (tmp_path / "model.safetensors").symlink_to(models / "heads3" / "model.safetensors")
    (tmp_path / "config.json").write_text(config.replace('"d_ff": 29', '"d_ff": 30'))
    with pytest.raises(ModelError, match=r"wi_0.*config\.json of the same model"):
        load_umt5(tmp_path, torch.device("cpu"), torch.float32)


def test_more_ranks_than_heads_of_keys_are_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of four ranks, of an encoder with three."""
    monkeypatch.setattr(shared_decoder, "share_of", lambda total, *, group: (total, 0))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 4)
    with pytest.raises(ModelError, match="3 heads of keys and values do not go round 4 ranks"):
        shared_decoder.narrow(PROGRAM.build("qwen2.5-vl").model.language_model, group=object())  # type: ignore[arg-type]
