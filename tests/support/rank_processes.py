"""Starts the ranks of a distributed test: one set of gloo (or NCCL) processes, whose program is a file beside the test.

The processes are forked from a server that has imported torch and the models once. A program has
`main(rank: int, world: int, group: ProcessGroup, *arguments)`.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 90.0  # of a set of processes; a collective gives up after two thirds of it
_PRELOAD = [
    "torch",
    "hypothesis",
    "safelight.runtime.models.wan.pipeline",
    "safelight.runtime.models.flux.pipeline",
]


def module(path: Path) -> ModuleType:
    """A Python file outside every package, imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


def run_ranks(program: Path, world: int, folder: Path, *arguments: Any, backend: str = "gloo") -> None:
    """Runs `program` on `world` ranks to the end; `folder` is empty.

    Raises AssertionError as soon as one fails, with what it raised, or when they take longer than LIMIT_S.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # or imports ask CUDA, and no forked process can use it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    errors = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(program, backend, rank, world, folder, errors, arguments))
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + LIMIT_S
        while (running := [r.sentinel for r in ranks if r.exitcode is None]) and not any(r.exitcode for r in ranks):
            if not connection.wait(running, max(0.0, deadline - time.monotonic())):
                break
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    said = [] if errors.empty() else [errors.get()]
    assert [rank.exitcode for rank in ranks] == [0] * world, "\n".join(said)
    for rank in ranks:
        rank.close()


def _rank(
    program: Path, backend: str, rank: int, world: int, folder: Path, errors: Any, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store, limit = (folder / "store").resolve().as_uri(), timedelta(seconds=LIMIT_S * 2 / 3)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world, timeout=limit)
    try:
        with torch.inference_mode():
            module(program).main(rank, world, dist.group.WORLD, *arguments)
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    dist.destroy_process_group()
