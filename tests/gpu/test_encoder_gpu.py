"""Text encoders shared by two CUDA devices through NCCL against one device, in float32: every way of sharing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_processes import module, run_ranks
from safetensors.torch import load_file

from safelight.runtime.parallel.mesh import ParallelMesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
TOLERANCE = 1e-4
RANKS = Path(__file__).with_name("encoder_gpu_ranks.py")


def test_every_rank_has_the_embeddings_of_one_device(tmp_path: Path) -> None:
    program = module(Path(__file__).parents[1] / "distributed" / "encoder_ranks.py")
    models, folder = tmp_path / "models", tmp_path / "ranks"
    models.mkdir()
    folder.mkdir()
    program.make(models)
    alone: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for name in program.HEADS:
            encoder = program.load(models / name, ParallelMesh.single(), torch.device("cuda", 0))
            alone |= program.encoded(encoder, name)
    run_ranks(RANKS, 2, folder, models, folder, backend="nccl")
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in range(2))
    for tp, sets in program.ways(2):
        for key, row in alone.items():
            made = first[f"{tp}x{sets} {key}"]
            assert torch.equal(made, second[f"{tp}x{sets} {key}"]), key
            assert (made - row.cpu()).abs().max() <= TOLERANCE, key
