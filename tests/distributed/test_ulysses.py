"""Sharded forwards on 2 and 4 gloo processes against one process: exact for any token and head count."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safelight.runtime.errors import ConfigError
from safelight.runtime.parallel.cfg import gather_branches, own_branches
from safelight.runtime.parallel.degrees import choose_degrees
from safelight.runtime.parallel.mesh import Axis, ParallelMesh
from safelight.runtime.parallel.ulysses import split_sizes, tokens_to_heads

TOLERANCE = 1e-5
LAYOUTS = [(2, 1), (4, 1), (2, 2), (4, 2)]  # (ranks, cfg degree); the rest is Ulysses
CASES = [
    "heads3_3x6x10_b1", "heads3_1x6x6_b2_tokens", "heads5_5x6x6_b1", "heads5_1x2x6_b2", "heads12_3x6x6_b2",
    "heads12_1x10x10_b1_tokens", "heads12_2x4x8_b1",
]  # fmt: skip
SWAPPED_CASE = "heads12_2x4x8_b1"  # equal shares


def start(folder: Path, world: int, cfg: int) -> list[dict[str, Tensor]]:
    """Runs the ranks to their end; their results in rank order."""
    script = Path(__file__).with_name("ulysses_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(cfg), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return start(tmp_path_factory.mktemp("one"), 1, 1)[0]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"{layout[0]}ranks-cfg{layout[1]}")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    world, cfg = request.param
    return start(tmp_path_factory.mktemp("ranks"), world, cfg)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_has_the_prediction_of_one_rank(
    one_rank: dict[str, Tensor], ranks: list[dict[str, Tensor]], case: str
) -> None:
    assert one_rank[case].std() > 0.1
    assert (one_rank[case][0] - one_rank[case][1]).abs().max() > 50 * TOLERANCE  # the branches' texts matter
    for result in ranks:
        assert (result[case] - one_rank[case]).abs().max() <= TOLERANCE


def test_each_collective_moves_what_it_says_and_its_inverse_undoes_it(ranks: list[dict[str, Tensor]]) -> None:
    failed = {name for result in ranks for name, value in result.items() if name.startswith("failed_") and value}
    assert not failed


def test_swapped_shards_show(one_rank: dict[str, Tensor], ranks: list[dict[str, Tensor]]) -> None:
    error = (ranks[0]["swapped"] - one_rank[SWAPPED_CASE]).abs().max()
    assert error > 50 * TOLERANCE


def test_shares_differ_by_at_most_one_and_add_up() -> None:
    assert split_sizes(7, 4) == [2, 2, 2, 1]
    assert split_sizes(3, 4) == [1, 1, 1, 0]
    assert split_sizes(12, 4) == [3, 3, 3, 3]


def test_one_rank_moves_nothing() -> None:
    q = torch.randn(1, 5, 3, 2)
    assert tokens_to_heads((q,), 5, group=None)[0] is q
    assert gather_branches(q, 1, group=None) is q


@pytest.mark.parametrize(
    ("world", "heads", "guided", "expected"),
    [
        (1, 12, True, (1, 1, 1)),
        (2, 12, True, (2, 1, 1)),
        (2, 12, False, (1, 1, 2)),
        (3, 12, True, (1, 1, 3)),
        (8, 12, True, (2, 1, 4)),
        (6, 3, True, (2, 1, 3)),
    ],
)
def test_guidance_is_split_first_and_ulysses_takes_the_rest(
    world: int, heads: int, guided: bool, expected: tuple[int, int, int]
) -> None:
    assert choose_degrees(world, heads, guided) == expected


def test_more_ranks_than_heads_can_use_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 6 ranks"):
        choose_degrees(8, 3, True)


def test_an_unguided_state_is_predicted_by_every_cfg_rank() -> None:
    mesh = ParallelMesh(1, 2, {Axis.CFG: 2, Axis.RING: 1, Axis.ULYSSES: 1}, dict.fromkeys(Axis, None), None)
    assert own_branches(mesh, 1) == range(1)
    assert own_branches(mesh, 2) == range(1, 2)
