"""Qwen-Image and its edits on layouts of 2 and 4 gloo processes against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_processes import module, run_ranks
from safetensors.torch import load_file
from torch import Tensor

from safelight.configs.parallel import Degrees

TOLERANCE = 1e-5
PROGRAM = Path(__file__).with_name("qwen_ranks.py")
SCRIPTS = Path(__file__).parents[2] / "scripts"
LAYOUTS = [
    *(Degrees(*d) for d in ((2, 1, 1), (1, 2, 1), (1, 1, 2))),
    Degrees(2, 1, 2),
    Degrees(1, 2, 2),
    Degrees(1, 1, 4),
]
BATCHES = ("guided", "unguided", "edits", "edit_unguided")
NAMES = {False: "qwen-image", True: "qwen-image-edit-2511"}


def name(degrees: Degrees) -> str:
    return f"{degrees.cfg}x{degrees.ring}x{degrees.ulysses}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    torch.set_num_threads(1)
    folder, make = tmp_path_factory.mktemp("model"), module(SCRIPTS / "make_checkpoint.py").make
    for each in NAMES.values():
        make(each, folder / each)
    return {edits: folder / each for edits, each in NAMES.items()}


@pytest.fixture(scope="module")
def one_rank(models: dict[bool, Path]) -> dict[str, Tensor]:
    program = module(PROGRAM)
    results: dict[str, Tensor] = {}
    for edits, root in models.items():
        both = program.FAMILY.Parity(root, reference=False)
        results |= program.run(both, both.ours, edits)
    return results


@pytest.fixture(scope="module")
def ranks(models: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Every rank's results."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(PROGRAM, 4, folder, models, [(d.cfg, d.ring, d.ulysses) for d in LAYOUTS], folder)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(4)]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("degrees", LAYOUTS, ids=name)
def test_every_rank_has_the_latents_and_the_picture_of_one_rank(
    one_rank: dict[str, Tensor], ranks: list[dict[str, Tensor]], degrees: Degrees, batch: str
) -> None:
    made = [result[f"{name(degrees)} {batch}"] for result in ranks]
    assert all(torch.equal(latents, made[0]) for latents in made)
    assert (made[0] - one_rank[batch]).abs().max() <= TOLERANCE
    pictures = ranks[0][f"{name(degrees)} {batch} pictures"]
    assert (pictures.int() - one_rank[f"{batch} pictures"].int()).abs().max() <= 1


def test_the_jobs_differ_by_more_than_the_tolerance(one_rank: dict[str, Tensor]) -> None:
    for batch in ("guided", "unguided", "edits"):
        assert (one_rank[batch][0] - one_rank[batch][1]).abs().max() > 50 * TOLERANCE
