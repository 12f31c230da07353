"""A pipeline of diffusers behind the real processes: followed step by step, cancelled, interleaved, started again."""

from __future__ import annotations

import base64
import io
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers_checkpoints
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from running_server import Running, Start, request
from served import Served, serve

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


def test_http_and_python_clients_bring_a_picture(editor: tuple[Served, Path]) -> None:
    served, folder = editor
    photo, fields = folder / "photo.jpg", {"prompt": "a dog", "num_inference_steps": "4", "seed": "1"}
    with served.http() as http:
        told = http.post("/v1/images/generations", json={"prompt": "a dog"})
        assert (told.status_code, told.json()["error"]["param"]) == (400, "image")
        broken = http.post("/v1/images/edits", data=fields, files={"image": ("a", photo.read_bytes()[:500])})
        assert (broken.status_code, broken.json()["error"]["param"]) == (400, "image")
        own = http.post("/v1/images/edits", json={"prompt": "a dog", "url": f"{served.url}/v1/models"})
        local = http.post("/v1/images/edits", json={"prompt": "a dog", "url": "http://localhost/photo.jpg"})
        for refused, message in ((own, "port 80 or 443"), (local, "of the public internet")):
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "url")
            assert message in refused.json()["error"]["message"]
        large = http.post("/v1/images/edits", data=fields, files={"image": ("a", bytes(2_000_000))})
        assert large.status_code == 413
        reply = http.post("/v1/images/edits", data=fields, files={"image": ("a", photo.read_bytes())})
        assert reply.status_code == 200, reply.text
    edited = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))))
    assert edited.shape == (56, 72, 3)
    with safelight.Client(folder / "edit-state") as client:
        for picture in (photo, str(photo), photo.read_bytes(), Image.open(photo)):
            made = client.generate("a dog", images=[picture], num_inference_steps=4, seed=1)
            assert np.array_equal(np.asarray(made.images()[0]), edited)
        other = client.generate("a dog", images=[Image.new("RGB", (72, 56))], num_inference_steps=4, seed=1)
        assert not np.array_equal(np.asarray(other.images()[0]), edited), "the picture reaches the model"
        for wrong in ([], [photo, photo]):
            with pytest.raises(InvalidRequest, match="1 expected") as caught:
                client.submit("a dog", images=wrong)
            assert caught.value.param == "images"
    command = [sys.executable, "-m", "safelight", "generate", "--model-path", str(folder / "sd-img2img")]
    command += ["--prompt", "a dog", "--image-path", str(photo), "--image-path", str(photo)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "1 expected by StableDiffusionImg2ImgPipeline (image-to-image), got 2" in done.stderr.replace("\n", " ")


def test_a_video_between_two_pictures_is_the_same_by_http_and_from_the_client(tmp_path: Path) -> None:
    model = diffusers_checkpoints.write("wan_between", tmp_path / "model")
    ends = [tmp_path / "first.png", tmp_path / "last.png"]
    for path, colour in zip(ends, ((250, 20, 20), (20, 20, 250)), strict=True):
        Image.new("RGB", (32, 32), colour).save(path)
    fields: dict[str, Any] = {
        "prompt": "it moves",
        "num_frames": 5,
        "num_inference_steps": 2,
        "seed": 1,
        "width": 32,
        "height": 32,
    }
    with serve("--model-path", str(model), "--state-dir", str(tmp_path / "state")) as served:
        with safelight.Client(tmp_path / "state") as client:

            def frames(*pictures: Path) -> npt.NDArray[np.uint8]:
                return client.generate(images=pictures, output_format="npy", **fields).frames()[0]

            expected, one, turned = frames(*ends), frames(ends[0]), frames(*ends[::-1])
            video = client.generate(images=ends, **fields).paths[0].read_bytes()
        assert expected.shape == (5, 32, 32, 3)
        assert not np.array_equal(expected, one), "the second picture reaches the model"
        assert not np.array_equal(expected, turned), "in order"
        files = [("input_reference", (path.name, path.read_bytes(), "image/png")) for path in ends]
        with served.http() as http:
            made = http.post("/v1/videos", data={k: str(v) for k, v in fields.items()}, files=files).json()
            served.until(f"/v1/videos/{made['id']}", lambda found: found["status"] == "completed")
            assert http.get(f"/v1/videos/{made['id']}/content").content == video
