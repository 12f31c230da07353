"""The Wan pipeline on every layout of 2, 3 and 4 gloo processes against one process, and what a step sends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rank_processes import module, run_ranks
from safetensors.torch import load_file
from torch import Tensor

from safelight.configs.parallel import Degrees, WantedDegrees
from safelight.configs.traffic import StepShape, step_traffic
from safelight.runtime.parallel.mesh import ParallelMesh

TOLERANCE = 1e-5
PROGRAM = Path(__file__).with_name("wan_pipeline_ranks.py")
SCRIPTS = Path(__file__).parents[2] / "scripts"
WORLDS = (2, 3, 4)
LAYOUTS = [degrees for world in WORLDS for degrees in WantedDegrees(world, world).layouts()]
BATCHES = ("video", "resumed", "videos", "picture", "pictures_unguided", "video_unguided")
STEP = StepShape(tokens=45, heads=4, head_dim=12, layers=2, prediction_channels=64, batch=3, item_bytes=4)
Ranks = dict[int, list[dict[str, Tensor]]]


def name(degrees: Degrees) -> str:
    return f"{degrees.cfg}x{degrees.ring}x{degrees.ulysses}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    module(SCRIPTS / "make_checkpoint.py").make("wan2.1-t2v", folder)
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
def test_every_rank_has_the_latents_of_one_rank(
    one_rank: dict[str, Tensor], ranks: Ranks, degrees: Degrees, batch: str
) -> None:
    made = [result[f"{name(degrees)} {batch}"] for result in ranks[degrees.world_size]]
    assert all(torch.equal(latents, made[0]) for latents in made)
    assert (made[0] - one_rank[batch]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("degrees", LAYOUTS, ids=name)
def test_a_step_sends_the_least_bytes_that_its_scheme_can(ranks: Ranks, degrees: Degrees) -> None:
    for rank, result in enumerate(ranks[degrees.world_size]):
        least, in_attention = step_traffic(STEP, degrees, rank), 2 * STEP.layers * (degrees.ulysses > 1)
        expected = {
            "all_to_all": least.ulysses + least.gather,
            "ring": least.ring,
            "all_gather": least.cfg,
            "exchanges": in_attention + (degrees.ulysses > 1) + (degrees.ring > 1),  # q, k and v go together
        }
        assert {kind: int(result[f"{name(degrees)} sent_{kind}"]) for kind in expected} == expected
        assert least.total > 0


def test_the_jobs_differ_by_more_than_the_tolerance(one_rank: dict[str, Tensor]) -> None:
    assert (one_rank["video"][0] - one_rank["video_unguided"][0]).abs().max() > 50 * TOLERANCE
    assert (one_rank["videos"][0] - one_rank["videos"][2]).abs().max() > 50 * TOLERANCE
    assert torch.equal(one_rank["resumed"], one_rank["video"][0])
