"""Offloaded weights on two gloo ranks, over two axes and with a shared text encoder: the bits of resident ones."""

from __future__ import annotations

from pathlib import Path

import torch
from deeper import deeper_wan
from rank_processes import run_ranks


def test_ranks_that_offload_make_the_same_bits(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = tmp_path / "ranks"
    folder.mkdir()
    model = deeper_wan(tmp_path / "model", 4)
    run_ranks(Path(__file__).with_name("offload_ranks.py"), 2, folder, model, folder)
    assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == ["0", "1"]
