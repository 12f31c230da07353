"""Sharded forwards on 2, 3 and 4 gloo processes against one process: exact for any layout, token and head count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_processes import module, run_ranks
from safetensors.torch import load_file
from torch import Tensor

from safelight.kernels.dispatch import reference_kernels
from safelight.runtime.parallel.mesh import ParallelMesh

TOLERANCE = 1e-5
RANKS = Path(__file__).with_name("transformer_ranks.py")
PROGRAM = module(RANKS)
LAYOUTS = [layout for world in (2, 3, 4) for layout in PROGRAM.layouts(world)]
RINGS = [layout for layout in LAYOUTS if layout[1] > 1]


def name(layout: tuple[int, int, int]) -> str:
    return "x".join(map(str, layout))


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Tensor]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        return {c.name: PROGRAM.predict(c, ParallelMesh.single(), reference_kernels()) for c in PROGRAM.CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Tensor]]]:
    """By number of ranks, every rank's results."""
    results = {}
    for world in (2, 3, 4):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        run_ranks(RANKS, world, folder, folder)
        results[world] = [load_file(folder / f"{rank}.safetensors") for rank in range(world)]
    return results


Ranks = dict[int, list[dict[str, Tensor]]]


def results_of(ranks: Ranks, layout: tuple[int, int, int], case: str) -> list[Tensor]:
    return [result[f"{name(layout)} {case}"] for result in ranks[layout[0] * layout[1] * layout[2]]]


@pytest.mark.parametrize("case", [case.name for case in PROGRAM.CASES])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_every_rank_has_the_prediction_of_one_rank(
    one_rank: dict[str, Tensor], ranks: Ranks, layout: tuple[int, int, int], case: str
) -> None:
    assert one_rank[case].std() > 0.1
    assert (one_rank[case][0] - one_rank[case][1]).abs().max() > 50 * TOLERANCE  # the branches' texts matter
    for prediction in results_of(ranks, layout, case):
        assert (prediction - one_rank[case]).abs().max() <= TOLERANCE


def control_error(one_rank: dict[str, Tensor], ranks: Ranks, layout: tuple[int, int, int], control: str) -> float:
    return float((results_of(ranks, layout, control)[0] - one_rank[PROGRAM.CASES[-1].name]).abs().max())


@pytest.mark.parametrize("control", ["swapped", "wrong_padding"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_swapped_shards_and_wrong_padding_show(
    one_rank: dict[str, Tensor], ranks: Ranks, layout: tuple[int, int, int], control: str
) -> None:
    assert control_error(one_rank, ranks, layout, control) > 50 * TOLERANCE


@pytest.mark.parametrize("control", ["dropped", "without_lse"])
@pytest.mark.parametrize("layout", RINGS, ids=name)
def test_a_broken_ring_shows(
    one_rank: dict[str, Tensor], ranks: Ranks, layout: tuple[int, int, int], control: str
) -> None:
    assert control_error(one_rank, ranks, layout, control) > 50 * TOLERANCE
