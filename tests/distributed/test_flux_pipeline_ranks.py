"""The FLUX pipeline on every layout of 2 and 4 gloo processes against one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rank_processes import module, run_ranks
from safetensors.torch import load_file
from torch import Tensor

from safelight.configs.parallel import Degrees, WantedDegrees
from safelight.runtime.parallel.mesh import ParallelMesh

TOLERANCE = 1e-4  # of latents that are about 30 in size
PROGRAM = Path(__file__).with_name("flux_pipeline_ranks.py")
SCRIPTS = Path(__file__).parents[2] / "scripts"
WORLDS = (2, 4)
LAYOUTS = [degrees for world in WORLDS for degrees in WantedDegrees(world, world).layouts()]
BATCHES = ("picture", "resumed", "pictures", "guided", "words")
Ranks = dict[int, list[dict[str, Tensor]]]


def name(degrees: Degrees) -> str:
    return f"{degrees.cfg}x{degrees.ring}x{degrees.ulysses}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    module(SCRIPTS / "make_checkpoint.py").make("flux1-dev", folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"


@pytest.fixture(scope="module")
def one_rank(model: Path, checkpoint: Path) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    program = module(PROGRAM)
    with torch.inference_mode():
        results: dict[str, Tensor] = program.run(*program.loaded(model, ParallelMesh.single()), checkpoint)
    return results


@pytest.fixture(scope="module")
def ranks(
    model: Path, checkpoint: Path, one_rank: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Ranks:
    """By number of ranks, every rank's results; all resume the checkpoint of one rank."""
    results = {}
    for world in WORLDS:
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        shutil.copy(checkpoint, folder / "resume.safetensors")
        layouts = [(d.cfg, d.ring, d.ulysses) for d in LAYOUTS if d.world_size == world]
        run_ranks(PROGRAM, world, folder, model, folder / "resume.safetensors", layouts, folder)
        results[world] = [load_file(folder / f"{rank}.safetensors") for rank in range(world)]
    return results


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("degrees", LAYOUTS, ids=name)
def test_every_rank_has_the_results_of_one_rank(
    one_rank: dict[str, Tensor], ranks: Ranks, degrees: Degrees, batch: str
) -> None:
    made = [result[f"{name(degrees)} {batch}"] for result in ranks[degrees.world_size]]
    assert all(torch.equal(latents, made[0]) for latents in made)
    assert (made[0] - one_rank[batch]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("degrees", LAYOUTS, ids=name)
def test_the_shared_decode_gives_the_same_picture(one_rank: dict[str, Tensor], ranks: Ranks, degrees: Degrees) -> None:
    for result in ranks[degrees.world_size]:
        assert (result[f"{name(degrees)} frames"].int() - one_rank["frames"].int()).abs().max() <= 1


def test_jobs_differ_and_positions_of_another_share_show(one_rank: dict[str, Tensor], ranks: Ranks) -> None:
    assert (one_rank["pictures"][0] - one_rank["pictures"][2]).abs().max() > 50 * TOLERANCE
    assert (one_rank["guided"][0] - one_rank["guided"][1]).abs().max() > 50 * TOLERANCE
    assert torch.equal(one_rank["resumed"], one_rank["picture"][0])
    wrong = [(d, ranks[d.world_size][-1]) for d in LAYOUTS if d.sp > 1]
    for degrees, result in wrong:
        latents = result[f"{name(degrees)} wrong_positions"]
        assert (latents - one_rank["picture after a step"][0]).abs().max() > 50 * TOLERANCE
