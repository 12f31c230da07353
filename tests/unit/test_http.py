"""The HTTP service against a fake scheduler and output: what goes in, what comes out, who is cancelled."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_backend import LIMITS, PNG, FakeBackend, http_server

from safelight.runtime import hub
from safelight.runtime import messages as m

Serve = Callable[..., tuple[FakeBackend, httpx2.Client]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(*, auto: bool = True, **spec: Any) -> tuple[FakeBackend, httpx2.Client]:
            backend = stack.enter_context(FakeBackend(tmp_path, auto=auto))
            url = stack.enter_context(http_server(backend, **spec))
            return backend, stack.enter_context(httpx2.Client(base_url=url, timeout=20))

        yield start


def picture(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a red apple", "num_inference_steps": 2, **changes}


def error_of(reply: httpx2.Response) -> dict[str, Any]:
    assert reply.headers["x-request-id"].startswith("req_")
    found: dict[str, Any] = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


# ---- models of diffusers

OWN_PIPELINE = """
class Own:
    def __call__(self, prompt, generator=None, callback_on_step_end=None): ...
"""


def diffusers_model(root: Path, kind: Any, *, trusted: bool = False) -> m.ServedModel:
    """All that a frontend reads of a checkpoint."""
    root.mkdir()
    (root / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return m.ServedModel("org/it", str(root), 1, "fp32", "fp32", "diffusers", trusted)


@pytest.mark.parametrize(
    ("kind", "path", "param", "where"),
    [
        ("StableDiffusionImg2ImgPipeline", "/v1/images/generations", "image", "/v1/images/edits"),
        ("StableVideoDiffusionPipeline", "/v1/videos", "input_reference", "send it as input_reference"),
    ],
)
def test_a_model_that_starts_from_a_picture_says_where_to_send_it(
    serve: Serve, tmp_path: Path, kind: str, path: str, param: str, where: str
) -> None:
    backend, http = serve(model=diffusers_model(tmp_path / "m", kind))
    reply = http.post(path, json={"prompt": "a"})
    assert reply.status_code == 400
    assert error_of(reply)["param"] == param
    assert where in error_of(reply)["message"]
    assert not backend.executions


def test_the_class_of_a_native_model_is_told(serve: Serve) -> None:
    assert serve()[1].get("/models").json()["pipeline_class"] == "WanPipeline"


@pytest.mark.parametrize("kind", ["PixArtSigmaPipeline", ["pipeline", "Own"]])
def test_the_class_of_any_pipeline_is_told(serve: Serve, tmp_path: Path, kind: Any) -> None:
    model = diffusers_model(tmp_path / "m", kind, trusted=True)
    (tmp_path / "m" / "pipeline.py").write_text(OWN_PIPELINE)
    found, name = serve(model=model)[1].get("/models").json(), kind if isinstance(kind, str) else kind[1]
    assert (found["pipeline_class"], found["pipeline_name"], found["task_type"]) == (name, name, "T2I")


def test_prompts_of_diffusers_go_as_they_are(serve: Serve, tmp_path: Path) -> None:
    backend, http = serve(model=diffusers_model(tmp_path / "m", "PixArtSigmaPipeline"))
    reply = http.post("/v1/images/generations", json=picture(prompt="  a  &amp; b ", size="64x64"))
    assert reply.status_code == 200, reply.text
    request = backend.jobs[backend.executions[0]].submit.request
    assert (request.prompt, request.token_ids, request.sampler) == ("  a  &amp; b ", {}, "default")


# ---- images


def test_a_picture_comes_as_base64_or_at_an_absolute_address(serve: Serve) -> None:
    backend, http = serve()
    reply = http.post("/v1/images/generations", json=picture(n=2, seed=5)).json()
    assert [base64.b64decode(image["b64_json"]) for image in reply["data"]] == [PNG, PNG]
    assert [image["seed"] for image in reply["data"]] == [5, 6]
    assert reply["usage"]["total_tokens"] == reply["usage"]["input_tokens"] + reply["usage"]["output_tokens"]
    image = http.post("/v1/images/generations", json=picture(response_format="url")).json()["data"][0]
    assert "b64_json" not in image
    assert image["url"].startswith(str(http.base_url))
    assert httpx2.get(image["url"]).content == PNG
    assert len(backend.executions) == 2


def test_every_field_reaches_the_request(serve: Serve) -> None:
    backend, http = serve()
    http.post(
        "/v1/images/generations",
        json=picture(
            n=2, size="256x128", seed=7, negative_prompt="blur", num_inference_steps=9, guidance_scale=2.5,
            output_format="jpeg", output_compression=40, sampler="euler",
        ),
    ).raise_for_status()  # fmt: skip
    request = backend.jobs[backend.executions[0]].submit.request
    assert (request.width, request.height, request.num_frames, request.num_outputs) == (256, 128, 1, 2)
    assert (request.seed, request.num_inference_steps, request.guidance_scale, request.sampler) == (7, 9, 2.5, "euler")
    assert request.media == m.MediaSpec(m.MediaFormat.JPEG, 40)
    assert request.negative_prompt == "blur"
    assert set(request.token_ids) == {"prompt", "negative"}


def test_nulls_are_absent_ignored_fields_are_silent_and_unknown_ones_are_warned_of(serve: Serve) -> None:
    _, http = serve()
    body = picture(n=None, size=None, seed=None, quality="high", user="me", background="opaque", moderation="low")
    reply = http.post("/v1/images/generations", json=body)
    assert (reply.status_code, reply.headers.get("x-safelight-warning")) == (200, None)
    reply = http.post("/v1/images/generations", json=picture(sed=3, **{"wörld\n": 1}))
    assert "'sed' was ignored; did you mean 'seed'?" in reply.headers["x-safelight-warning"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"size": "0x9"}, "size"),
        ({"size": "2048x1024"}, "size"),
        ({"size": "100x128"}, "size"),
        ({"size": "128x128", "width": 64}, "size"),
        ({"height": 100}, "height"),
        ({"seed": -1}, "seed"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"guidance_scale": 1000}, "guidance_scale"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale"),
        ({"cfg_normalization": 1.0}, "cfg_normalization"),
        ({"cfg_truncation": 0.5}, "cfg_truncation"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 101}, "output_compression"),
        ({"sampler": "magic"}, "sampler"),
        ({"partial_images": 2}, "partial_images"),
        ({"image": "x"}, "image"),
    ],
)
def test_a_wrong_parameter_is_named_before_any_work(serve: Serve, changes: dict[str, Any], param: str) -> None:
    backend, http = serve()
    reply = http.post("/v1/images/generations", json=picture(**changes))
    assert reply.status_code == 400, reply.text
    assert (error_of(reply)["param"], error_of(reply)["type"]) == (param, "invalid_request_error")
    assert not backend.executions


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": NaN}']
)
def test_what_is_no_json_object_is_refused(serve: Serve, content: bytes) -> None:
    _, http = serve()
    reply = http.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    error_of(reply)


def test_a_streamed_picture_ends_with_usage_and_a_failure_with_an_error(serve: Serve) -> None:
    backend, http = serve(auto=False)
    with http.stream("POST", "/v1/images/generations", json=picture(stream=True)) as reply:
        backend.until(lambda: bool(backend.executions))
        backend.complete(backend.executions[0])
        (event,) = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "x-safelight-warning" not in reply.headers
    assert (event["type"], base64.b64decode(event["b64_json"])) == ("image_generation.completed", PNG)
    assert event["usage"]["output_tokens"] > 0
    with http.stream("POST", "/v1/images/generations", json=picture(stream=True)) as reply:
        backend.until(lambda: len(backend.executions) == 2)
        backend.fail(backend.executions[1])
        (event,) = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]
    assert event["error"]["message"] == "it broke"


def events_of(reply: httpx2.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]


def test_previews_of_every_picture_come_before_it_is_done(serve: Serve) -> None:
    backend, http = serve(auto=False)
    body = picture(stream=True, partial_images=3, n=2, num_inference_steps=4)
    with http.stream("POST", "/v1/images/generations", json=body) as reply:
        backend.until(lambda: bool(backend.executions))
        job = backend.executions[0]
        assert backend.jobs[job].submit.request.previews == 3
        for index in range(2):
            for number in range(3):
                backend.preview(job, number, index)
        backend.progress(job, 3)
        backend.complete(job)
        *previews, first, second = events_of(reply)
    assert "x-safelight-warning" not in reply.headers
    # Two pictures' worth came faster than anybody could read: the last few are kept.
    places = [(event["index"], event["partial_image_index"]) for event in previews]
    assert places == sorted(places)
    assert places[-4:] == [(0, 2), (1, 0), (1, 1), (1, 2)]
    assert {event["type"] for event in previews} == {"image_generation.partial_image"}
    assert [base64.b64decode(event["b64_json"]) for event in previews] == [PNG] * len(previews)
    assert (previews[-1]["size"], previews[-1]["output_format"], previews[-1]["step"]) == ("1x1", "png", 3)
    assert {first["type"], second["type"]} == {"image_generation.completed"}


def test_a_model_without_previews_says_so_and_makes_the_picture(serve: Serve, tmp_path: Path) -> None:
    backend, http = serve(model=diffusers_model(tmp_path / "m", "PixArtSigmaPipeline"))
    body = picture(stream=True, partial_images=2, size="64x64")
    reply = http.post("/v1/images/generations", json=body)
    assert "partial_images: only the finished result" in reply.headers["x-safelight-warning"]
    assert "diffusers" in reply.headers["x-safelight-warning"]
    assert [event["type"] for event in events_of(reply)] == ["image_generation.completed"]
    assert backend.jobs[backend.executions[0]].submit.request.previews == 0


def test_another_vae_than_the_models_has_its_own_factors_or_none(serve: Serve, tmp_path: Path) -> None:
    model = m.ServedModel("org/builtin", str(hub.builtin_model()), 1, "fp32", "fp32", vae_path=str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan", "latents_mean": [1]}')
    backend, http = serve(model=model)
    reply = http.post("/v1/videos", json={"prompt": "a car", "num_frames": 5, "partial_images": 2})
    assert "fit_preview.py" in reply.headers["x-safelight-warning"]
    assert backend.jobs[reply.json()["id"]].submit.request.previews == 0


def test_a_videos_events_carry_the_previews_that_it_was_asked_for(serve: Serve) -> None:
    backend, http = serve(auto=False)
    job = http.post("/v1/videos", data={"prompt": "a car", "num_frames": "5", "partial_images": "5"}).json()["id"]
    assert backend.jobs[job].submit.request.previews == 5
    with http.stream("GET", f"/v1/videos/{job}/events") as reply:
        backend.until(lambda: bool(backend.jobs[job].subscribers))
        for number in (0, 1, 0):  # the last of an output process that was started again
            backend.preview(job, number)
        backend.complete(job)
        lines = list(reply.iter_lines())
    names = [line[7:] for line in lines if line.startswith("event: ")]
    assert [name for name in names if name != "video.progress"] == ["video.partial_image"] * 2 + ["video.completed"]
    found = [json.loads(line[6:]) for line in lines if line.startswith("data: ") and "b64_json" in line]
    assert [(e["id"], e["partial_image_index"], base64.b64decode(e["b64_json"])) for e in found] == [
        (job, 0, PNG),
        (job, 1, PNG),
    ]
    reply = http.post("/v1/videos", json={"prompt": "a car", "partial_images": 21})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "partial_images")


def test_a_client_that_goes_away_cancels_its_picture_and_nobody_elses(serve: Serve) -> None:
    backend, http = serve(auto=False)
    for body in (picture(), picture(stream=True)):
        seen = len(backend.executions)
        with (
            pytest.raises(httpx2.TimeoutException),
            http.stream("POST", "/v1/images/generations", json=body, timeout=0.5) as reply,
        ):
            reply.read()
        backend.until(lambda: backend.cancelled == backend.executions)
        assert len(backend.executions) == seen + 1
    video = http.post("/v1/videos", json={"prompt": "a car"}).json()["id"]
    assert video not in backend.cancelled


# ---- retries and keys


def test_a_retry_joins_the_request_that_still_runs(serve: Serve) -> None:
    backend, http = serve(auto=False)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(http.post, "/v1/images/generations", json=picture())
        backend.until(lambda: len(backend.executions) == 1)
        other = pool.submit(http.post, "/v1/images/generations", json=picture())
        backend.until(lambda: len(backend.executions) == 2)
        headers = {"x-stainless-retry-count": "1"}
        retry = pool.submit(http.post, "/v1/images/generations", json=picture(), headers=headers)
        waiting = backend.executions[1]
        backend.until(lambda: len(backend.jobs[waiting].subscribers) == 1)
        for job in list(backend.executions):
            backend.complete(job)
        ids = [future.result().json()["id"] for future in (first, other, retry)]
    assert ids == [*backend.executions, backend.executions[1]]


def test_an_sdk_that_timed_out_finds_its_job_still_running(serve: Serve) -> None:
    backend, http = serve(auto=False)
    headers = {"x-stainless-read-timeout": "1", "x-stainless-retry-count": "0"}
    with pytest.raises(httpx2.TimeoutException):
        http.post("/v1/images/generations", json=picture(), headers=headers, timeout=1.0)
    with ThreadPoolExecutor(1) as pool:
        headers["x-stainless-retry-count"] = "1"
        retry = pool.submit(http.post, "/v1/images/generations", json=picture(), headers=headers)
        backend.until(lambda: bool(backend.jobs[backend.executions[0]].subscribers))
        backend.complete(backend.executions[0])
        assert retry.result().json()["id"] == backend.executions[0]
    assert (len(backend.executions), backend.cancelled) == (1, [])


def test_an_idempotency_key_is_one_execution_and_another_body_a_conflict(serve: Serve) -> None:
    backend, http = serve()
    headers = {"Idempotency-Key": "order-1"}
    ids = {http.post("/v1/videos", json={"prompt": "a car"}, headers=headers).json()["id"] for _ in range(5)}
    assert len(ids) == len(backend.executions) == 1
    reply = http.post("/v1/videos", json={"prompt": "a cat"}, headers=headers)
    assert (reply.status_code, error_of(reply)["code"]) == (409, "conflict")
    assert reply.headers["x-should-retry"] == "false"
    assert http.post("/v1/videos", json={"prompt": "a car"}, headers={"Idempotency-Key": "x" * 300}).status_code == 400


def test_a_key_whose_client_went_away_is_free_again(serve: Serve) -> None:
    backend, http = serve(auto=False)
    headers = {"Idempotency-Key": "order-2"}
    with pytest.raises(httpx2.TimeoutException):
        http.post("/v1/images/generations", json=picture(), headers=headers, timeout=0.5)
    backend.until(lambda: not backend.jobs)
    backend.auto = True
    assert http.post("/v1/images/generations", json=picture(), headers=headers).status_code == 200
    assert len(backend.executions) == 2


def test_two_hundred_keys_in_fifty_parallel_requests_each_are_two_hundred_executions(serve: Serve) -> None:
    backend, http = serve()
    barrier = threading.Barrier(50)

    def client(_: int) -> set[str]:
        found = set()
        with httpx2.Client(base_url=http.base_url, timeout=60) as own:
            for key in range(200):
                if key % 20 == 0:
                    barrier.wait()
                headers = {"Idempotency-Key": f"key-{key}"}
                found.add(own.post("/v1/videos", json={"prompt": f"car {key}"}, headers=headers).json()["id"])
        return found

    with ThreadPoolExecutor(50) as pool:
        ids = set[str]().union(*pool.map(client, range(50)))
    assert len(ids) == len(backend.executions) == 200


# ---- videos


@pytest.mark.parametrize("kind", ["json", "multipart", "urlencoded"])
def test_a_video_is_made_of_any_kind_of_body(serve: Serve, kind: str) -> None:
    backend, http = serve()
    values = {"prompt": "a car", "seconds": "2", "size": "64x128", "seed": "3", "num_inference_steps": "4"}
    if kind == "json":
        numbers = {"seconds": 2, "seed": 3, "num_inference_steps": 4}
        reply = http.post("/v1/videos", json=values | numbers)
    elif kind == "multipart":
        reply = http.post("/v1/videos", files={name: (None, value) for name, value in values.items()})
    else:
        reply = http.post("/v1/videos", data=values)
    assert reply.status_code == 200, reply.text
    video = reply.json()
    assert set(video) == {
        "id", "object", "created_at", "completed_at", "expires_at", "model", "progress", "prompt",
        "remixed_from_video_id", "seconds", "size", "status", "error",
    }  # fmt: skip
    assert (video["object"], video["seconds"], video["size"], video["prompt"]) == ("video", "2", "64x128", "a car")
    submit = backend.jobs[video["id"]].submit
    assert (submit.attached, submit.request.num_frames, submit.request.seed) == (False, 17, 3)


def test_a_video_is_told_of_from_the_queue_to_its_end(serve: Serve) -> None:
    backend, http = serve(auto=False)
    reply = http.post("/v1/videos", json={"prompt": "a car", "num_inference_steps": 10})
    video = reply.json()
    assert (video["status"], reply.headers["openai-poll-after-ms"]) == ("queued", "3000")
    content = f"/v1/videos/{video['id']}/content"
    assert (http.get(content).status_code, error_of(http.get(content))["param"]) == (400, "id")
    backend.progress(video["id"], 4)
    backend.until(lambda: backend.jobs[video["id"]].step == 4)
    now = http.get(f"/v1/videos/{video['id']}").json()
    assert (now["status"], now["progress"]) == ("in_progress", 40)
    with http.stream("GET", f"/v1/videos/{video['id']}/events") as stream:
        lines = stream.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        assert (json.loads(first[6:])["stage"], json.loads(first[6:])["step"]) == ("denoising", 4)
        backend.complete(video["id"])
        events = [line[7:] for line in lines if line.startswith("event: ")]
    assert events[-1] == "video.completed"
    done = http.get(f"/v1/videos/{video['id']}")
    assert (done.json()["status"], done.json()["progress"]) == ("completed", 100)
    assert "openai-poll-after-ms" not in done.headers
    assert http.get(content).content == PNG
    assert http.get(content, params={"variant": "thumbnail"}).status_code == 400


def test_a_failed_video_says_why(serve: Serve) -> None:
    backend, http = serve(auto=False)
    video = http.post("/v1/videos", json={"prompt": "a car"}).json()["id"]
    backend.fail(video)
    backend.until(lambda: backend.jobs[video].status is not None)
    found = http.get(f"/v1/videos/{video}").json()
    assert (found["status"], found["error"]) == ("failed", {"code": "job_failed", "message": "it broke"})


@pytest.mark.parametrize(
    ("header", "status", "part"),
    [
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=60-", 206, slice(60, None)),
        ("bytes=-5", 206, slice(-5, None)),
        ("bytes=0-999999", 206, slice(0, None)),
        ("bytes=9-3", 200, slice(0, None)),
        ("bytes=0-1,4-5", 200, slice(0, None)),
        ("apples=1-2", 200, slice(0, None)),
        ("bytes=-", 200, slice(0, None)),
        ("bytes=999999-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
def test_a_range_of_a_video(serve: Serve, header: str, status: int, part: slice | None) -> None:
    _, http = serve()
    video = http.post("/v1/videos", json={"prompt": "a car"}).json()["id"]
    reply = http.get(f"/v1/videos/{video}/content", headers={"range": header})
    assert reply.status_code == status
    if part is None:
        assert reply.headers["content-range"] == f"bytes */{len(PNG)}"
        error_of(reply)
    else:
        assert reply.content == PNG[part]
        assert int(reply.headers["content-length"]) == len(reply.content)


def test_videos_are_listed_in_pages_and_deleted(serve: Serve) -> None:
    _, http = serve()
    ids = [http.post("/v1/videos", json={"prompt": f"car {i}"}).json()["id"] for i in range(5)]
    http.post("/v1/images/generations", json=picture())
    page = http.get("/v1/videos", params={"limit": 2}).json()
    assert ([v["id"] for v in page["data"]], page["has_more"]) == (ids[:2:-1], True)
    page = http.get("/v1/videos", params={"limit": 4, "after": page["last_id"]}).json()
    assert ([v["id"] for v in page["data"]], page["has_more"]) == (ids[2::-1], False)
    assert [v["id"] for v in http.get("/v1/videos?order=asc").json()["data"]] == ids
    for query in ("limit=0", "limit=x", "order=up", "after=nobody", "limit=1&limit=2"):
        assert http.get(f"/v1/videos?{query}").status_code == 400
    gone = http.delete(f"/v1/videos/{ids[0]}").json()
    assert gone == {"id": ids[0], "object": "video.deleted", "deleted": True}
    assert http.get(f"/v1/videos/{ids[0]}").status_code == 404
    assert http.delete(f"/v1/videos/{ids[0]}").status_code == 404


# ---- the rest


def test_models_are_found_by_ids_with_slashes(serve: Serve) -> None:
    _, http = serve()
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["org/builtin"]
    assert http.get("/v1/models/org/builtin").json()["object"] == "model"
    assert http.get("/v1/models/org%2Fbuiltin").json()["id"] == "org/builtin"
    assert http.get("/v1/models/other/one").status_code == 404
    assert http.post("/v1/images/generations", json=picture(model="other")).status_code == 404
    info = http.get("/models").json()
    assert set(info) == {
        "model_path", "task_type", "pipeline_name", "pipeline_class", "num_gpus", "dit_precision", "vae_precision",
    }  # fmt: skip


def test_sglangs_models_page_says_how_the_model_runs(serve: Serve) -> None:
    model = m.ServedModel("org/builtin", str(hub.builtin_model()), 4, "bf16", "fp32")
    assert serve(model=model)[1].get("/models").json() == {
        "model_path": "org/builtin", "task_type": "T2V", "pipeline_name": "builtin", "pipeline_class": "WanPipeline",
        "num_gpus": 4, "dit_precision": "bf16", "vae_precision": "fp32",
    }  # fmt: skip


def test_without_the_key_only_the_probes_answer_and_owners_do_not_see_each_other(serve: Serve) -> None:
    _, http = serve(api_keys=(("ann", "key-of-ann"), ("bob", "key-of-bob")))
    ann, bob = ({"authorization": f"Bearer key-of-{name}"} for name in ("ann", "bob"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic key-of-ann"}):
        reply = http.get("/v1/models", headers=headers)
        assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key")
    assert http.get("/ready").status_code in (200, 503)
    assert http.get("/metrics").status_code == 401
    video = http.post("/v1/videos", json={"prompt": "a car"}, headers=ann).json()["id"]
    assert http.get(f"/v1/videos/{video}", headers=bob).status_code == 404
    assert http.get("/v1/videos", headers=bob).json()["data"] == []
    assert http.get(f"/v1/videos/{video}/content", headers=ann).content == PNG


def test_a_large_body_is_refused_unread(serve: Serve) -> None:
    _, http = serve()
    for path, most in (
        ("/v1/images/generations", LIMITS.max_body_bytes), ("/v1/images/edits", LIMITS.max_input_bytes),
        ("/v1/videos", LIMITS.max_input_bytes),
    ):  # fmt: skip
        reply = http.post(path, json={"prompt": "x" * most})
        assert (reply.status_code, error_of(reply)["type"]) == (413, "invalid_request_error")
        assert str(most) in error_of(reply)["message"]
    reply = http.post("/v1/images/edits", json={"prompt": "x", "user": "x" * LIMITS.max_body_bytes})
    assert reply.status_code == 400

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 100_000

    with contextlib.suppress(httpx2.WriteError):  # the server closes while the client still sends
        assert http.post("/v1/videos", content=endless()).status_code == 413


@pytest.mark.parametrize(
    ("info", "status", "headers"),
    [
        (m.ErrorInfo("overloaded", "full", retry_after_s=0.2), 429, {"retry-after": "1"}),
        (m.ErrorInfo("overloaded", "full", retry_after_s=500.0), 429, {"retry-after": "120"}),
        (m.ErrorInfo("overloaded", "it shuts down"), 503, {"retry-after": "5"}),
        (m.ErrorInfo("worker_lost", "none left"), 503, {"retry-after": "5"}),
        (m.ErrorInfo("too_large", "it needs 9 GB"), 400, {}),
        (m.ErrorInfo("internal", "a fault"), 500, {"x-should-retry": "false"}),
    ],
)
def test_a_refusal_has_its_status_and_says_whether_to_retry(
    serve: Serve, info: m.ErrorInfo, status: int, headers: dict[str, str]
) -> None:
    backend, http = serve()
    backend.refuse = lambda submit: info
    reply = http.post("/v1/videos", json={"prompt": "a car"})
    assert (reply.status_code, error_of(reply)["message"]) == (status, info.message)
    found = {name: reply.headers[name] for name in ("retry-after", "x-should-retry") if name in reply.headers}
    assert found == headers


def test_a_failed_picture_is_not_worth_a_retry(serve: Serve) -> None:
    backend, http = serve(auto=False)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(http.post, "/v1/images/generations", json=picture())
        backend.until(lambda: bool(backend.executions))
        backend.fail(backend.executions[0], "poisoned")
        assert (reply.result().status_code, reply.result().headers["x-should-retry"]) == (500, "false")


def test_other_paths_and_methods_have_openais_error_too(serve: Serve) -> None:
    _, http = serve()
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/v1/videos/", 404),
        ("GET", "/v1/videos/nothing", 404),
        ("GET", "/v1/images/nothing/content", 404),
        ("PUT", "/v1/videos", 405),
        ("DELETE", "/health", 405),
    ):
        reply = http.request(method, path)
        assert reply.status_code == status
        error_of(reply)
    assert set(http.request("PUT", "/v1/videos").headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


def test_health_falls_with_the_scheduler_and_comes_back(serve: Serve) -> None:
    backend, http = serve()

    def until(status: int) -> dict[str, Any]:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            reply = http.get("/health")
            if reply.status_code == status:
                found: dict[str, Any] = reply.json()
                return found
        raise AssertionError(f"/health never was {status}")

    assert until(200)["status"] == "ok"
    backend.silent = True
    assert "silent" in until(503)["components"]["scheduler"]
    assert http.get("/ready").json()["ready"] is False
    backend.silent = False
    assert until(200)["components"]["workers 0"] == "ok"


def test_metrics_count_replies_and_jobs(serve: Serve) -> None:
    _, http = serve()
    http.post("/v1/images/generations", json=picture()).raise_for_status()
    http.get("/nothing")
    page = http.get("/metrics").text
    assert 'safelight_http_requests_total{method="POST",route="create_image",status="200"} 1.0' in page
    assert 'safelight_http_requests_total{method="GET",route="none",status="404"} 1.0' in page
    assert 'safelight_jobs_submitted_total{origin="images"} 1.0' in page
