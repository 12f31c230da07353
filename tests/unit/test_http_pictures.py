"""Pictures that HTTP requests bring: how they come, what is refused before any work, and that they reach the job."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest
from fake_backend import PNG, FakeBackend, http_server
from PIL import Image

from safelight.entrypoints.http import pictures
from safelight.entrypoints.http.addresses import UrlPolicy
from safelight.runtime import messages as m
from safelight.runtime.errors import InvalidRequest, Overloaded
from safelight.runtime.inputs import InputStore, check_picture

Serve = Callable[..., tuple[FakeBackend, httpx2.Client]]
EDITS = "/v1/images/edits"


def encoded(width: int = 40, height: int = 24, kind: str = "PNG", colour: tuple[int, int, int] = (9, 8, 7)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    return file.getvalue()


def data_url(content: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def diffusers_model(root: Path, kind: str) -> m.ServedModel:
    """All that a frontend reads of a checkpoint, with a VAE of factor 8."""
    for name, content in {
        "model_index.json": {"_class_name": kind, "vae": ["diffusers", "AutoencoderKL"]},
        "vae/config.json": {"block_out_channels": [1, 2, 3, 4]},
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return m.ServedModel("org/it", str(root), 1, "fp32", "fp32", "diffusers")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(kind: str | None, *, auto: bool = True) -> tuple[FakeBackend, httpx2.Client]:
            backend = stack.enter_context(FakeBackend(tmp_path, auto=auto))
            changes: dict[str, Any] = {"model": diffusers_model(tmp_path / "m", kind)} if kind else {}
            url = stack.enter_context(http_server(backend, **changes))
            return backend, stack.enter_context(httpx2.Client(base_url=url, timeout=30))

        yield start


def last(backend: FakeBackend) -> m.GenerationRequest:
    return backend.jobs[backend.executions[-1]].submit.request


def error_of(reply: httpx2.Response) -> dict[str, Any]:
    assert reply.status_code == 400, reply.text
    found: dict[str, Any] = reply.json()["error"]
    return found


def test_a_picture_comes_as_file_or_url_in_forms_and_json(serve: Serve) -> None:
    backend, http = serve("StableDiffusionImg2ImgPipeline")
    photo = encoded(kind="JPEG")
    expected = check_picture(photo).ref
    fields = {"prompt": "as a watercolour", "num_inference_steps": "3", "guidance_scale": "2.5", "seed": "4"}
    ways: list[dict[str, Any]] = [
        {"data": fields, "files": {"image": ("../../etc/passwd", photo, "text/html")}},
        {"data": fields, "files": {"image[]": ("a.png", photo, "image/png")}},
        {"data": {**fields, "url": data_url(photo)}},
        {"data": {**fields, "image": data_url(photo)}},  # urlencoded
        {"json": {**fields, "num_inference_steps": 3, "guidance_scale": 2.5, "seed": 4, "image": data_url(photo)}},
        {"json": {"prompt": "a", "num_inference_steps": 3, "guidance_scale": 2.5, "seed": 4, "url": [data_url(photo)]}},
    ]
    for way in ways:
        reply = http.post(EDITS, **way)
        assert reply.status_code == 200, reply.text
        assert base64.b64decode(reply.json()["data"][0]["b64_json"]) == PNG
        made = last(backend)
        assert (made.images, made.width, made.height) == ((expected,), 40, 24), "the size is the picture's"
        assert (made.num_inference_steps, made.guidance_scale, made.seed, made.num_frames) == (3, 2.5, 4, 1)
    assert InputStore(backend.inputs).read(expected).size == (40, 24)
    assert [path.stem for path in backend.inputs.iterdir()] == [expected.sha256]


def test_the_fields_of_generations_are_those_of_edits(serve: Serve) -> None:
    backend, http = serve("StableDiffusionImg2ImgPipeline")
    body = {
        "prompt": "a", "image": data_url(encoded()), "n": 2, "size": "64x48", "negative_prompt": "blur",
        "output_format": "jpeg", "output_compression": 40, "response_format": "url", "quality": "high",
        "input_fidelity": "high",
    }  # fmt: skip
    reply = http.post(EDITS, json=body)
    made = last(backend)
    assert "x-safelight-warning" not in reply.headers
    assert (made.width, made.height, made.num_outputs, made.negative_prompt) == (64, 48, 2, "blur")
    assert made.media == m.MediaSpec(m.MediaFormat.JPEG, 40)
    assert httpx2.get(reply.json()["data"][1]["url"]).content == PNG
    with http.stream("POST", EDITS, json={"prompt": "a", "image": data_url(encoded()), "stream": True}) as stream:
        (event,) = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert (event["type"], event["size"]) == ("image_edit.completed", "40x24")


def test_pictures_are_counted_in_order_and_masks_refused_before_any_work(serve: Serve) -> None:
    backend, http = serve("QwenImageEditPlusPipeline")
    three = [encoded(8 * n, 8) for n in (3, 1, 2)]
    files = [("image[]", ("same name", picture, "image/png")) for picture in three]
    assert http.post(EDITS, data={"prompt": "a"}, files=files).status_code == 200
    assert [ref.width for ref in last(backend).images] == [24, 8, 16]
    mixed = {"prompt": "a", "url": data_url(three[1])}
    assert http.post(EDITS, data=mixed, files={"image": ("a", three[0], "image/png")}).status_code == 200
    assert [ref.width for ref in last(backend).images] == [24, 8]
    broken = ("a", b"no picture", "image/png")
    for brought, message, param in (
        ([("image", broken)] * 4, "1 to 3 expected", "image"),  # counted before they are looked at
        ([("image", broken), ("mask", broken)], "edits whole pictures", "mask"),
        ([("prompt", broken)], "text expected", "prompt"),
        ([("image", broken)], "neither PNG nor JPEG nor WebP", "image"),
        ([*files[:1], ("image[]", ("cut", three[0][:50], "image/png"))], "cannot be decoded", "image"),
    ):
        error = error_of(http.post(EDITS, data={"prompt": "a"} if param != "prompt" else {}, files=brought))
        assert message in error["message"]
        assert error["param"] == param
    for body, param in (
        ({}, "image"),
        ({"image": []}, "image"),
        ({"image": 3}, "image"),
        ({"mask": data_url(three[0]), "image": data_url(three[0])}, "mask"),
        ({"image": "data:image/png,x"}, "image"),
        ({"image": "data:image/png;base64,??"}, "image"),
        ({"url": data_url(b"x")}, "url"),
        ({"image": data_url(three[0]), "partial_images": 2}, "partial_images"),
        ({"image": data_url(three[0]), "size": "4096x4096"}, "size"),
    ):
        assert error_of(http.post(EDITS, json={"prompt": "a", **body}))["param"] == param
    off = error_of(http.post(EDITS, json={"prompt": "a", "url": "https://example.org/a.png"}))
    assert "--allow-url-inputs" in off["message"]
    assert off["param"] == "url"
    assert len(backend.executions) == 2


def test_a_model_without_pictures_says_what_it_takes(serve: Serve) -> None:
    backend, http = serve(None)
    error = error_of(http.post(EDITS, data={"prompt": "a"}, files={"image": ("a", b"no picture", "image/png")}))
    assert error["param"] == "image"
    assert "0 expected" in error["message"]
    error = error_of(http.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": ("a", encoded())}))
    assert error["param"] == "input_reference"
    assert error_of(http.post("/v1/images/generations", json={"prompt": "a", "image": "x"}))["param"] == "image"
    assert not backend.executions


def test_a_model_of_videos_edits_no_pictures(serve: Serve) -> None:
    backend, http = serve("WanImageToVideoPipeline")
    error = error_of(http.post(EDITS, json={"prompt": "a", "image": data_url(encoded())}))
    assert (error["param"], "/v1/videos" in error["message"]) == ("model", True)
    assert not backend.executions


def test_pictures_wait_for_each_other_and_a_crowd_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_WAITING", 2)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 40 * 24 * 3)

    async def run() -> None:
        intake = pictures.Intake(InputStore(tmp_path), UrlPolicy())
        brought = pictures.Brought("image", (encoded(), encoded(24, 40)))
        two = [asyncio.ensure_future(intake.take(brought)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await intake.take(brought)
        one, other = await asyncio.gather(*two)
        assert one == other == tuple(check_picture(content).ref for content in brought.files)
        with pytest.raises(InvalidRequest, match="megapixels expected, got 40x24"):  # together
            await intake.take(pictures.Brought("image", (encoded(),) * 4))
        intake.close()

    asyncio.run(run())


def test_a_hostile_picture_is_the_error_of_its_request_alone(serve: Serve) -> None:
    backend, http = serve("StableDiffusionImg2ImgPipeline")
    bomb = bytearray(encoded())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    error = error_of(http.post(EDITS, data={"prompt": "a"}, files={"image": ("a", bytes(bomb), "image/png")}))
    assert error["param"] == "image"
    large = encoded(2048, 1024)  # the result would be as large
    assert error_of(http.post(EDITS, json={"prompt": "a", "image": data_url(large)}))["param"] == "height"
    assert not list(backend.inputs.iterdir()), "nothing of a refused request is kept"
    assert http.post(EDITS, json={"prompt": "a", "image": data_url(large), "size": "64x32"}).status_code == 200
    assert http.get("/health").status_code == 200


def test_a_video_starts_from_its_input_reference(serve: Serve) -> None:
    backend, http = serve("WanImageToVideoPipeline")
    fields = {"prompt": "it moves", "size": "64x48", "num_frames": "5"}
    for way in (
        {"data": fields, "files": {"input_reference": ("first.png", encoded(), "image/png")}},
        {"json": {**fields, "num_frames": 5, "input_reference": data_url(encoded())}},
    ):
        reply = http.post("/v1/videos", **way)
        assert reply.status_code == 200, reply.text
        made = last(backend)
        assert (made.images, made.num_frames, made.width) == ((check_picture(encoded()).ref,), 5, 64)
    first, end = (("input_reference", ("a", encoded(8 * n, 8), "image/png")) for n in (1, 2))
    assert http.post("/v1/videos", data=fields, files=[first, end]).status_code == 200
    assert [ref.width for ref in last(backend).images] == [8, 16]
    error = error_of(http.post("/v1/videos", data=fields, files={"input_reference": ("a", b"x", "image/png")}))
    assert error["param"] == "input_reference"


def test_a_picture_is_fetched_where_the_policy_allows_it(tmp_path: Path) -> None:
    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = encoded() if self.path == "/a.png" else b"nothing"
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ExitStack() as stack:
        site = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Pictures))
        thread = Thread(target=site.serve_forever, args=(0.05,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(site.shutdown)
        policy = UrlPolicy(True, lambda address: address == "127.0.0.1", frozenset((site.server_port,)))
        backend = stack.enter_context(FakeBackend(tmp_path))
        model = diffusers_model(tmp_path / "m", "StableDiffusionImg2ImgPipeline")
        url = stack.enter_context(http_server(backend, policy=policy, model=model))
        http = stack.enter_context(httpx2.Client(base_url=url, timeout=30))
        address = f"http://127.0.0.1:{site.server_port}"
        assert http.post(EDITS, json={"prompt": "a", "url": f"{address}/a.png"}).status_code == 200
        assert last(backend).images == (check_picture(encoded()).ref,)
        error = error_of(http.post(EDITS, json={"prompt": "a", "url": f"{address}/b.png"}))
        assert "neither PNG nor JPEG nor WebP" in error["message"]
        assert error_of(http.post(EDITS, json={"prompt": "a", "url": "http://127.0.0.1/a.png"}))["param"] == "url"


def test_a_retry_joins_by_its_pictures_and_a_key_is_of_one_picture(serve: Serve) -> None:
    backend, http = serve("StableDiffusionImg2ImgPipeline")
    retry = {"x-stainless-retry-count": "1"}

    def send(picture: bytes, **headers: str) -> httpx2.Response:
        files = {"image": ("a", picture, "image/png")}
        return http.post(EDITS, data={"prompt": "a"}, files=files, headers=headers)

    one, other = encoded(), encoded(colour=(1, 1, 1))
    first = send(one).json()["id"]
    assert send(one, **retry).json()["id"] == first
    assert send(other, **retry).json()["id"] != first
    assert send(one, **{"idempotency-key": "k"}).json()["id"] == send(one, **{"idempotency-key": "k"}).json()["id"]
    assert send(other, **{"idempotency-key": "k"}).status_code == 409
    assert len(backend.executions) == 3
