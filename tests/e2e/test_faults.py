"""Processes really killed and stopped: nothing accepted is lost, answered twice, or changed by the disturbance."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from running_server import Running, Start, alive, request

from safelight.runtime.errors import SafelightError
from safelight.runtime.messages import Event, Stage, Status

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEPS = 300  # about a second of denoising on the tiny model


Frames = npt.NDArray[np.uint8]


def pixels(event: Event) -> Frames:
    assert event.status is Status.COMPLETED, event
    frames: Frames = np.load(Path(event.artifacts[0].path))
    return frames


def undisturbed(running: Running, **changes: object) -> Frames:
    return pixels(
        running.terminals([running.client.submit(request(num_inference_steps=STEPS, **changes))]).popitem()[1]
    )


def test_a_worker_killed_at_any_point_changes_nothing(start: Start) -> None:
    running = start(checkpoint_every=20)
    expected = undisturbed(running)
    for step in (1, 30, 150, 290, STEPS):
        job = running.client.submit(request(num_inference_steps=STEPS))
        running.at_step(job, step)
        running.kill("worker 0.0")
        assert np.array_equal(pixels(running.terminals([job])[job]), expected), step


def test_a_job_resumes_from_its_last_checkpoint_and_not_from_its_start(start: Start) -> None:
    running = start(checkpoint_every=20)
    job = running.client.submit(request(num_inference_steps=STEPS))
    running.at_step(job, 150)
    running.kill("worker 0.0")
    running.terminals([job])
    steps = [e.progress.step for e in running.seen[job] if e.progress and e.progress.stage is Stage.DENOISING]
    back = [after for before, after in itertools.pairwise(steps) if after < before]
    assert all(step >= 100 for step in back), f"went back to {back}"


def test_without_checkpoints_a_killed_workers_job_starts_over(start: Start) -> None:
    running = start(checkpoint_every=0)
    expected = undisturbed(running)
    job = running.client.submit(request(num_inference_steps=STEPS))
    running.at_step(job, 100)
    running.kill("worker 0.0")
    assert np.array_equal(pixels(running.terminals([job])[job]), expected)


def test_a_rank_killed_in_a_group_of_two_changes_nothing(start: Start) -> None:
    running = start(num_gpus=2, checkpoint_every=20)
    expected = undisturbed(running)
    for rank, step in ((0, 40), (1, 120)):
        job = running.client.submit(request(num_inference_steps=STEPS))
        running.at_step(job, step)
        running.kill(f"worker 0.{rank}")
        assert np.array_equal(pixels(running.terminals([job])[job]), expected)


def test_a_stopped_worker_is_noticed_and_replaced(start: Start) -> None:
    running = start(checkpoint_every=20)
    expected = undisturbed(running)
    job = running.client.submit(request(num_inference_steps=STEPS))
    running.at_step(job, 60)
    stopped = running.kill("worker 0.0", signal.SIGSTOP)
    assert np.array_equal(pixels(running.terminals([job])[job]), expected)
    assert not alive(stopped)


def test_a_killed_replica_leaves_the_other_one_working(start: Start) -> None:
    running = start(num_gpus=2, replicas=2, checkpoint_every=20)
    expected = undisturbed(running)
    jobs = [running.client.submit(request(num_inference_steps=STEPS)) for _ in range(4)]
    running.at_step(jobs[0], 20)
    running.kill("worker 1.0")
    assert all(np.array_equal(pixels(event), expected) for event in running.terminals(jobs).values())


@pytest.mark.parametrize("role", ["scheduler", "output"])
def test_a_control_process_killed_at_any_point_changes_nothing(start: Start, role: str) -> None:
    running = start(checkpoint_every=20)
    expected = undisturbed(running)
    for step in (0, 1, 80, 200, STEPS):
        job = running.client.submit(request(num_inference_steps=STEPS))
        if step:
            running.at_step(job, step)
        running.kill(role)
        assert np.array_equal(pixels(running.terminals([job])[job]), expected), step


@pytest.mark.parametrize("role", ["scheduler", "output"])
def test_a_stopped_control_process_is_replaced(start: Start, role: str) -> None:
    running = start(checkpoint_every=20)
    expected = undisturbed(running)
    job = running.client.submit(request(num_inference_steps=STEPS))
    running.at_step(job, 60)
    running.kill(role, signal.SIGSTOP)
    assert np.array_equal(pixels(running.terminals([job])[job]), expected)


def test_a_worker_stopped_while_the_scheduler_restarts_is_noticed(start: Start) -> None:
    running = start(checkpoint_every=20)
    expected = undisturbed(running)
    job = running.client.submit(request(num_inference_steps=STEPS))
    running.at_step(job, 60)
    stopped = running.kill("worker 0.0", signal.SIGSTOP)
    running.kill("scheduler")
    assert np.array_equal(pixels(running.terminals([job])[job]), expected)
    assert not alive(stopped)


def test_a_scheduler_killed_while_draining_goes_on_draining(start: Start) -> None:
    running = start(checkpoint_every=20)
    job = running.client.submit(request(num_inference_steps=STEPS))
    running.at_step(job, 20)
    running.kill("scheduler")
    assert running.server.drain(60)
    assert running.terminals([job], timeout_s=10)[job].status is Status.COMPLETED
    with pytest.raises(SafelightError, match="shutting down"):
        running.client.submit(request())


def test_a_job_that_kills_its_worker_is_quarantined_and_its_neighbours_complete(start: Start) -> None:
    running = start(checkpoint_every=20)
    expected = undisturbed(running)
    poison = running.client.submit(request(num_inference_steps=STEPS, seed=99))
    neighbours = [running.client.submit(request(num_inference_steps=STEPS)) for _ in range(2)]
    deaths = 0
    while not any(e.status for e in running.seen.get(poison, ())):

        def hurts(event: Event) -> bool:  # its encoding is told once per attempt, when the worker surely has it
            progress = event.progress
            encoding = progress is not None and progress.stage is Stage.ENCODING
            return event.job == poison and (encoding or event.status is not None)

        event = running.until(hurts)
        if event.status is None and deaths < 8:
            running.kill("worker 0.0")
            deaths += 1
    ends = running.terminals([poison, *neighbours])
    assert ends[poison].status is Status.FAILED
    error = ends[poison].error
    assert error is not None
    assert error.code == "poisoned"
    assert 2 <= deaths <= 3
    assert all(np.array_equal(pixels(ends[job]), expected) for job in neighbours)


def test_a_cancelled_job_ends_at_once_and_the_next_one_runs(start: Start) -> None:
    running = start()
    job = running.client.submit(request(num_inference_steps=1000))
    running.at_step(job, 5)
    running.client.cancel(job)
    assert running.terminals([job], timeout_s=5)[job].status is Status.CANCELLED
    undisturbed(running)


def test_draining_finishes_what_runs_and_refuses_what_is_new(start: Start) -> None:
    running = start()
    job = running.client.submit(request(num_inference_steps=STEPS))
    running.at_step(job, 5)
    assert running.server.drain(60)
    assert running.terminals([job], timeout_s=10)[job].status is Status.COMPLETED
    with pytest.raises(SafelightError, match="shutting down"):
        running.client.submit(request())


def test_stopping_leaves_no_process_no_slot_and_no_folder(start: Start) -> None:
    running = start(num_gpus=2)
    pids = list(running.server.pids().values())
    folder = running.server._run_folder
    assert folder is not None
    running.client.submit(request(num_inference_steps=STEPS))
    running.server.stop()
    assert len(pids) == 4
    assert not any(alive(pid) for pid in pids)
    assert not folder.root.exists()
    assert not folder.slots.exists()
