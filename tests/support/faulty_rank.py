"""Ranks with a fault built in, for the end-to-end tests: what `launch.processes.run_rank` is replaced by.

The fault is rank 1's, at step `AT` of any job, and in the group's first epoch only; `slow` is in every step.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgspec

AT = 50
Step = Callable[[Any, Sequence[Any]], list[Any]]


def run_rank(fault: str, spec_bytes: bytes, status: Connection) -> None:
    """The process main of one rank, with `fault` if it is the one to have it."""
    from safelight.runtime.launch.rank import run_rank as real
    from safelight.runtime.messages import WorkerSpec
    from safelight.runtime.models.wan.pipeline import WanPipeline

    spec = msgspec.msgpack.decode(spec_bytes, type=WorkerSpec)
    if spec.rank == 1 and spec.group_epoch == 0:
        pipeline: Any = WanPipeline
        pipeline.step = FAULTS[fault](pipeline.step)
    real(spec_bytes, status)


def _at(states: Sequence[Any]) -> bool:
    return bool(states[0].step == AT)


def _absent(step: Step) -> Step:
    """Lives on, heart and all, and never enters the step's collectives."""

    def faulty(pipeline: Any, states: Sequence[Any]) -> list[Any]:
        if _at(states):
            threading.Event().wait()
        return step(pipeline, states)

    return faulty


def _slow(step: Step) -> Step:
    def faulty(pipeline: Any, states: Sequence[Any]) -> list[Any]:
        time.sleep(0.01)
        return step(pipeline, states)

    return faulty


def _signalled(number: signal.Signals) -> Callable[[Step], Step]:
    """Gets a signal within the step's exchange of predictions, when the other rank waits for it."""

    def fault(step: Step) -> Step:
        import torch.distributed as dist

        gather = dist.all_gather

        def signalled(*arguments: Any, **options: Any) -> Any:
            os.kill(os.getpid(), number)
            return gather(*arguments, **options)

        def faulty(pipeline: Any, states: Sequence[Any]) -> list[Any]:
            dist.all_gather = signalled if _at(states) else gather
            return step(pipeline, states)

        return faulty

    return fault


FAULTS: dict[str, Callable[[Step], Step]] = {
    "absent": _absent,
    "slow": _slow,
    "killed": _signalled(signal.SIGKILL),
    "stopped": _signalled(signal.SIGSTOP),
}
