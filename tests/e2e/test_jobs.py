"""What clients may rely on, against a real server: fairness, several outputs, refusals, idempotence, leases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zmq
from running_server import Start, request

from safelight.runtime import transport
from safelight.runtime.errors import Cancelled, Conflict, InvalidRequest, TooLarge
from safelight.runtime.messages import FromScheduler, MediaFormat, MediaSpec, Stage, Status, Submit
from safelight.runtime.ulid import new_ulid

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_a_short_job_is_answered_while_a_long_one_runs(start: Start) -> None:
    running = start()
    long = running.client.submit(request(num_inference_steps=1000))
    running.at_step(long, 10)
    short = running.client.submit(request(num_inference_steps=4))
    assert running.terminals([short])[short].status is Status.COMPLETED
    last = running.seen[long][-1].progress
    assert running.seen[long][-1].status is None
    assert last is not None
    assert (last.stage, last.step < 1000) == (Stage.DENOISING, True)


def test_outputs_of_one_job_equal_jobs_with_consecutive_seeds_whatever_runs_beside_them(start: Start) -> None:
    running = start()
    together = running.client.submit(request(num_outputs=3, seed=10, num_inference_steps=20))
    alone = [running.client.submit(request(seed=10 + i, num_inference_steps=20)) for i in range(3)]
    ends = running.terminals([together, *alone])
    artifacts = ends[together].artifacts
    assert [a.index for a in artifacts] == [0, 1, 2]
    for artifact, job in zip(artifacts, alone, strict=True):
        assert np.array_equal(np.load(artifact.path), np.load(ends[job].artifacts[0].path))
    assert len({Path(a.path).read_bytes() for a in artifacts}) == 3


def test_bad_requests_are_refused_before_any_work(start: Start) -> None:
    running = start(slot_bytes=64 << 20)
    running.terminals([running.client.submit(request())])  # the scheduler knows now what the group can hold
    with pytest.raises(InvalidRequest, match=r"33.*32.*48") as bad_height:
        running.client.submit(request(height=33))
    assert bad_height.value.param == "height"
    with pytest.raises(InvalidRequest, match="6") as bad_frames:
        running.client.submit(request(num_frames=6))
    assert bad_frames.value.param == "num_frames"
    with pytest.raises(TooLarge, match="GB"):
        running.client.submit(request(height=2048, width=2048, num_frames=4001))
    with pytest.raises(InvalidRequest, match="one picture") as bad_format:
        running.client.submit(request(media=MediaSpec(MediaFormat.PNG)))
    assert bad_format.value.param == "format"
    with pytest.raises(InvalidRequest, match="ULID") as bad_id:
        running.client.submit(request(), job="my-job")
    assert bad_id.value.param == "job"
    with pytest.raises(InvalidRequest, match="deadline_s"):
        running.client.submit(request(), deadline_s=float("nan"))
    assert running.client.status().queued == 0


def test_a_job_sent_twice_runs_once_and_another_body_is_a_conflict(start: Start) -> None:
    running = start()
    job = new_ulid()
    for _ in range(3):
        assert running.client.submit(request(num_inference_steps=50), job=job) == job
    with pytest.raises(Conflict):
        running.client.submit(request(num_inference_steps=51), job=job)
    running.client.attach(job)
    assert running.terminals([job])[job].status is Status.COMPLETED
    assert len(list(Path(running.seen[job][-1].artifacts[0].path).parent.glob(f"{job}-*"))) == 1


def test_a_deadline_and_a_lost_lease_cancel_a_job(start: Start) -> None:
    running = start()
    late = running.client.submit(request(num_inference_steps=1000), deadline_s=0.5)
    with pytest.raises(Cancelled, match="deadline"):
        running.client.wait(late)
    left = new_ulid()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with transport.connect_dealer(context, running.server.endpoints.submit, FromScheduler) as channel:
        channel.send(
            Submit(left, "local", request(num_inference_steps=1000, num_frames=17, height=96, width=96, num_outputs=10))
        )
        assert channel.socket.poll(5000)
    context.term()
    running.client.attach(left, renew=False)
    end = running.terminals([left], timeout_s=60)[left]
    assert end.status is Status.CANCELLED, end
    assert end.error is not None
    assert "lease" in end.error.message
