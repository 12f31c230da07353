"""VAEs shared by 2 and 4 gloo processes against one process: exact for any size."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.timeout(300)  # four processes on a busy core

TOLERANCE = 1e-5
SCRIPT = Path(__file__).with_name("vae_ranks.py")


def loaded() -> ModuleType:
    """The ranks' module, which is in no package."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


RANKS = loaded()


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Tensor]:
    with torch.inference_mode():
        alone: dict[str, Tensor] = RANKS.run(None)
    return alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks, run to their end, left their results."""
    made = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(made)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS.WORLD)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in started]
    finally:
        for rank in started:
            rank.kill()
    assert not any(rank.returncode for rank in started), "\n".join(errors)
    return made


@pytest.fixture(scope="module", params=[2, 4], ids=lambda count: f"{count}ranks")
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Tensor]]:
    """The results of each rank of a group."""
    files = sorted(folder.glob(f"{request.param}ranks.*"))
    assert len(files) == request.param
    return [load_file(file) for file in files]


@pytest.mark.parametrize("case", RANKS.cases(None))
def test_every_rank_has_the_picture_of_one_rank(
    one_rank: dict[str, Tensor], ranks: list[dict[str, Tensor]], case: str
) -> None:
    alone = one_rank[case]
    assert alone.float().std() > 0.05
    for result in ranks:
        assert result[case].shape == alone.shape
        if alone.dtype == torch.uint8:
            assert (result[case].int() - alone.int()).abs().max() <= 1
        else:
            assert (result[case] - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("control", RANKS.CONTROLS)
def test_what_the_ranks_must_exchange_shows_when_it_is_missing(
    one_rank: dict[str, Tensor], ranks: list[dict[str, Tensor]], control: str
) -> None:
    assert (ranks[0][control] - one_rank[RANKS.CONTROLS[control]]).abs().max() > 50 * TOLERANCE
