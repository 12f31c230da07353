"""The Wan pipeline on a cfg and on a Ulysses mesh of two gloo processes against one process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-5
RANKS = Path(__file__).with_name("wan_pipeline_ranks.py")
SCRIPTS = Path(__file__).parents[2] / "scripts"


def module(path: Path) -> ModuleType:
    """A Python file outside every package, imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    module(SCRIPTS / "make_checkpoint.py").make("wan2.1-t2v", folder)
    return folder


def start(model: Path, folder: Path, world: int, cfg: int) -> list[dict[str, Tensor]]:
    """Runs the ranks to their end; their results in rank order."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), str(world), str(cfg), str(model), str(folder)],
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
def one_rank(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    module(RANKS).main(0, 1, 1, model, folder)
    return folder


@pytest.mark.parametrize("cfg", [2, 1], ids=["cfg", "ulysses"])
def test_two_ranks_equal_one_and_resume_its_checkpoint(model: Path, one_rank: Path, tmp_path: Path, cfg: int) -> None:
    alone = load_file(one_rank / "0.safetensors")
    shutil.copy(one_rank / "0.checkpoint.safetensors", tmp_path / "resume.safetensors")
    ranks = start(model, tmp_path, 2, cfg)
    for name, latents in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert (ranks[0][name] - latents).abs().max() <= TOLERANCE, name
    assert (ranks[0]["resumed"] - alone["unipc"]).abs().max() <= TOLERANCE
    saved, theirs = (load_file(folder / "0.checkpoint.safetensors") for folder in (tmp_path, one_rank))
    assert {k: t.shape for k, t in saved.items()} == {k: t.shape for k, t in theirs.items()}
    assert not torch.allclose(alone["unipc"], alone["euler"], atol=50 * TOLERANCE)
