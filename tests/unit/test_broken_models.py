"""What is wrong with a model's folder is one ModelError that names it, before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deeper import script

from safelight.runtime.errors import ModelError
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.parallel.mesh import ParallelMesh

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated transformer": (lambda m: truncate(m / "transformer" / WEIGHTS), f"transformer/{WEIGHTS}"),
    "no transformer weights": (lambda m: (m / "transformer" / WEIGHTS).unlink(), "transformer has neither"),
    "other transformer width": (lambda m: edit(m / "transformer/config.json", "ffn_dim", 96), "shape"),
    "no text encoder weights": (lambda m: (m / "text_encoder" / "model.safetensors").unlink(), "text_encoder"),
    "no vae config": (lambda m: (m / "vae" / "config.json").unlink(), "vae"),
    "unsupported sampler": (lambda m: edit(m / "scheduler/scheduler_config.json", "solver_order", 7), "solver_order"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    script("make_checkpoint").make("wan2.1-t2v", folder)
    return folder


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_part_is_named(checkpoint: Path, tmp_path: Path, name: str) -> None:
    damage, expected = BREAKS[name]
    model = shutil.copytree(checkpoint, tmp_path / "model")
    options = LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, ParallelMesh.single())
    damage(model)
    with pytest.raises(ModelError, match=expected):
        load_pipeline(model, options)


def test_the_same_folder_undamaged_is_loaded(checkpoint: Path) -> None:
    options = LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, ParallelMesh.single())
    assert load_pipeline(checkpoint, options).weights_bytes() > 0
