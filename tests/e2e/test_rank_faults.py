"""One rank of two killed, stopped, absent or slow in a collective, and two ranks that share a text encoder."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import faulty_rank
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from running_server import Running, Start, request

from safelight.runtime.launch import processes, specs
from safelight.runtime.messages import Event, SchedulerSpec, Stage, Status

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEPS, EVERY = 100, 20


def pixels(event: Event) -> npt.NDArray[np.uint8]:
    assert event.status is Status.COMPLETED, event
    frames: npt.NDArray[np.uint8] = np.load(Path(event.artifacts[0].path))
    return frames


def finished(running: Running) -> npt.NDArray[np.uint8]:
    """One job's frames; its last steps are not done twice: it went on from a checkpoint."""
    job = running.client.submit(request(num_inference_steps=STEPS))
    frames = pixels(running.terminals([job])[job])
    steps = [e.progress.step for e in running.seen[job] if e.progress and e.progress.stage is Stage.DENOISING]
    back = [after for before, after in itertools.pairwise(steps) if after < before]
    assert all(step > faulty_rank.AT - 2 * EVERY for step in back), f"went back to {back}"
    return frames


@pytest.fixture
def expected(start: Start) -> npt.NDArray[np.uint8]:
    """What two ranks without a fault make."""
    running = start(num_gpus=2)
    frames = finished(running)
    running.server.stop()
    return frames


def with_fault(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(processes, "run_rank", functools.partial(faulty_rank.run_rank, fault))


def ends(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why groups ended."""
    return [r.getMessage() for r in caplog.records if "epoch" in r.getMessage() and " ends: " in r.getMessage()]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("killed", r"rank 1 ended with -9|[Cc]onnection"), ("stopped", r"rank 1 silent for [45] s, process state T")],
)
def test_a_rank_lost_in_a_collective_is_noticed_within_five_seconds_and_its_job_resumes(
    start: Start,
    expected: npt.NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    reason: str,
) -> None:
    with_fault(monkeypatch, fault)
    assert np.array_equal(finished(start(num_gpus=2, checkpoint_every=EVERY)), expected)
    assert len(ends(caplog)) == 1
    assert re.search(f"group 0 epoch 0 ends: .*({reason})", ends(caplog)[0])


def test_a_live_rank_that_never_enters_the_collective_is_ended_at_the_op_deadline(
    start: Start, expected: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = specs.scheduler_spec

    def impatient(*arguments: Any) -> SchedulerSpec:
        return msgspec.structs.replace(made(*arguments), min_op_deadline_s=3.0)

    monkeypatch.setattr(specs, "scheduler_spec", impatient)
    with_fault(monkeypatch, "absent")
    assert np.array_equal(finished(start(num_gpus=2, checkpoint_every=EVERY)), expected)
    assert re.search(r"epoch 0 ends: plan \d+ was not finished by ranks \[(0, )?1\] within 3 s", ends(caplog)[0])


def test_a_slow_rank_delays_and_does_not_deadlock(
    start: Start, expected: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_fault(monkeypatch, "slow")
    assert np.array_equal(finished(start(num_gpus=2)), expected)
    assert ends(caplog) == []


def test_two_ranks_that_share_the_text_encoder_make_the_same_picture(
    start: Start, expected: npt.NDArray[np.uint8]
) -> None:
    shared = finished(start(num_gpus=2, tp_size=2))
    assert np.abs(shared.astype(int) - expected.astype(int)).max() <= 1
