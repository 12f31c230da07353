"""On several CUDA devices: attention over all layouts of their ranks, through windows and by NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_processes import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_attention_equals_attention(tmp_path: Path, world: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices")
    run_ranks(Path(__file__).with_name("sequence_gpu_ranks.py"), world, tmp_path, backend="nccl")
