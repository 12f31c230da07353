"""One rank of the shared text encoder's tests on GPUs; `test_encoder_gpu.py` starts it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from rank_processes import module

PROGRAM = Path(__file__).parents[1] / "distributed" / "encoder_ranks.py"


def main(rank: int, world: int, group: dist.ProcessGroup, models: Path, folder: Path) -> None:
    module(PROGRAM).main(rank, world, group, models, folder, torch.device("cuda", rank))
