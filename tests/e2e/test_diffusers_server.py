"""A pipeline of diffusers behind the real processes: followed step by step, cancelled, interleaved, started again."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import diffusers_checkpoints
import numpy as np
import numpy.typing as npt
import pytest
from running_server import Running, Start, request
from served import serve

import safelight
from safelight.runtime.errors import InvalidRequest
from safelight.runtime.inputs import check_picture
from safelight.runtime.messages import Event, GenerationRequest, MediaFormat, MediaSpec, Stage, Status

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_checkpoints.write("stable_diffusion_3", tmp_path_factory.mktemp("checkpoint"))


def job_of(**changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {
        "token_ids": {},
        "num_frames": 1,
        "sampler": "default",
        "media": MediaSpec(MediaFormat.NPY),
    }
    return request(**fields | changes)


def pixels(event: Event) -> npt.NDArray[np.uint8]:
    assert event.status is Status.COMPLETED, event
    frames: npt.NDArray[np.uint8] = np.load(Path(event.artifacts[0].path))
    return frames


def steps_of(running: Running, job: str) -> list[int]:
    return [e.progress.step for e in running.seen[job] if e.progress and e.progress.stage is Stage.DENOISING]


def test_jobs_interleave_are_followed_and_cancelled_and_survive_their_worker(start: Start, sd3: Path) -> None:
    running = start(model=sd3)
    long, short = job_of(num_inference_steps=200, seed=1), job_of(num_inference_steps=20, seed=2, prompt="two dogs")

    # alone
    expected = {}
    for name, wanted in (("long", long), ("short", short)):
        job = running.client.submit(wanted)
        expected[name] = pixels(running.terminals([job])[job])
        assert steps_of(running, job) == list(range(1, wanted.num_inference_steps + 1))

    # together, the short one submitted in the middle of the long one; detached jobs are jobs like any other
    first = running.client.submit(long, attached=False)
    running.at_step(first, 5)
    second = running.client.submit(short, attached=False)
    running.until(lambda event: event.job == second and event.status is not None)
    assert steps_of(running, first)[-1] < 200, "the short one did not wait for the long one"
    ends = running.terminals([first, second])
    assert np.array_equal(pixels(ends[first]), expected["long"])
    assert np.array_equal(pixels(ends[second]), expected["short"])

    # cancelled in the middle
    endless = running.client.submit(job_of(num_inference_steps=1000))
    running.at_step(endless, 3)
    running.client.cancel(endless)
    assert running.terminals([endless])[endless].status is Status.CANCELLED
    job = running.client.submit(short)
    assert np.array_equal(pixels(running.terminals([job])[job]), expected["short"])

    # its worker dies: no checkpoint, so from the first step again, and the same picture
    job = running.client.submit(long)
    running.at_step(job, 20)
    running.kill("worker 0.0")
    assert np.array_equal(pixels(running.terminals([job])[job]), expected["long"])
    back = [after for before, after in itertools.pairwise(steps_of(running, job)) if after < before]
    assert back == [1]


def test_a_scheduler_that_was_started_again_goes_on_with_running_calls(start: Start, sd3: Path) -> None:
    running = start(model=sd3)
    wanted = job_of(num_inference_steps=150)
    job = running.client.submit(wanted)
    expected = pixels(running.terminals([job])[job])
    job = running.client.submit(wanted)
    running.at_step(job, 10)
    running.kill("scheduler")
    assert np.array_equal(pixels(running.terminals([job])[job]), expected)
    steps = steps_of(running, job)
    assert steps == sorted(steps), "the call went on where it was"


def test_a_picture_becomes_another_and_wrong_ones_are_refused(start: Start, tmp_path: Path) -> None:
    model = diffusers_checkpoints.write("stable_diffusion_img2img", tmp_path / "model")
    running = start(model=model, diffusers_kwargs={"strength": 0.9})
    image = Path(__file__).parents[2] / "docs" / "images" / "builtin_images.png"
    picture = running.server.inputs.add(check_picture(image.read_bytes()))
    jobs = [running.client.submit(job_of(images=(picture,), seed=seed)) for seed in (1, 1, 2)]
    ends = running.terminals(jobs)
    frames = [pixels(ends[job]) for job in jobs]
    assert frames[0].shape == (1, 32, 32, 3)
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])
    with pytest.raises(InvalidRequest, match="pictures"):
        running.client.submit(job_of())


def test_serve_answers_for_a_pipeline_of_diffusers(sd3: Path) -> None:
    with serve("--model-path", str(sd3)) as served, served.http() as http:
        served.said(r"backend: diffusers \(no native family runs StableDiffusion3Pipeline")
        body = {"prompt": "a dog", "size": "32x32", "num_inference_steps": 3, "seed": 1}
        first, again = (http.post("/v1/images/generations", json=body) for _ in range(2))
        assert first.status_code == 200, first.text
        assert first.json()["data"][0]["b64_json"] == again.json()["data"][0]["b64_json"]
        assert http.get("/models").json()["pipeline_class"] == "StableDiffusion3Pipeline"
        wrong = http.post("/v1/images/generations", json={**body, "size": "33x32"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "size")


def test_python_clients_bring_a_picture_and_http_is_told_that_it_cannot(tmp_path: Path) -> None:
    model = diffusers_checkpoints.write("stable_diffusion_img2img", tmp_path / "model")
    image = str(Path(__file__).parents[2] / "docs" / "images" / "builtin_images.png")
    with serve("--model-path", str(model), "--state-dir", str(tmp_path / "state")) as served:
        with served.http() as http:
            reply = http.post("/v1/images/generations", json={"prompt": "a dog"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "image")
        with safelight.Client(tmp_path / "state") as client:
            made = client.generate("a dog", image_path=image, width=32, height=32, num_inference_steps=4, seed=1)
            assert made.images()[0].size == (32, 32)
            with pytest.raises(InvalidRequest, match="pictures"):
                client.submit("a dog")
