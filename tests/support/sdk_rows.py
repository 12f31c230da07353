"""The OpenAI SDK, unmodified, against a running server: one row for each fact that we rely on. Run as a program:

PYTHONPATH=FOLDER_OF_THE_SDK python sdk_rows.py URL MODEL URL_OF_AN_EDITOR PHOTO
->  {"version": ..., "rows": {"sync NAME": "pass"}}
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import pathlib
import sys
import traceback
import urllib.request
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import openai

STEPS = {"num_inference_steps": 2}
VIDEO = {"num_inference_steps": 2, "num_frames": 5, "seed": 1}


class Rows:
    """`self.client` is the sync or the async client; `call` awaits what has to be awaited."""

    def __init__(self, client: Any, model: str) -> None:
        self.client, self.model = client, model

    async def call(self, result: Any) -> Any:
        return await result if inspect.isawaitable(result) else result

    async def each(self, stream: Any) -> list[Any]:
        stream = await self.call(stream)
        return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)

    async def refused(self, kind: type[openai.APIStatusError], result: Callable[[], Any]) -> Any:
        try:
            await self.call(result())
        except kind as error:
            return error
        raise AssertionError(f"{kind.__name__} expected")

    async def video(self, **more: Any) -> Any:
        return await self.call(self.client.videos.create(prompt="a red apple", extra_body={**VIDEO, **more}))

    # ---- images

    async def image_as_base64(self) -> None:
        reply = await self.call(self.client.images.generate(prompt="a red apple", model=self.model, extra_body=STEPS))
        assert base64.b64decode(reply.data[0].b64_json)[:4] == b"\x89PNG", reply
        assert reply.usage.total_tokens > 0
        assert reply._request_id.startswith("req_")

    async def image_at_an_absolute_url(self) -> None:
        reply = await self.call(
            self.client.images.generate(prompt="a red apple", response_format="url", extra_body=STEPS)
        )
        url = reply.data[0].url
        assert url.startswith(str(self.client.base_url).removesuffix("/v1/")), url
        assert urllib.request.urlopen(url).read()[:4] == b"\x89PNG"

    async def explicit_none_is_absent(self) -> None:
        none: Any = None
        reply = await self.call(
            self.client.images.generate(prompt="a red apple", n=none, size=none, user=none, extra_body=STEPS)
        )
        assert len(reply.data) == 1

    async def extra_body_is_obeyed(self) -> None:
        body = {**STEPS, "seed": 7}
        replies = [
            await self.call(self.client.images.generate(prompt="a red apple", n=n, extra_body=body)) for n in (1, 2)
        ]
        assert replies[0].data[0].b64_json == replies[1].data[0].b64_json
        assert replies[1].data[0].b64_json != replies[1].data[1].b64_json

    async def jpeg_with_compression(self) -> None:
        reply = await self.call(
            self.client.images.generate(
                prompt="a red apple", output_format="jpeg", output_compression=50, extra_body=STEPS
            )
        )
        assert base64.b64decode(reply.data[0].b64_json)[:2] == b"\xff\xd8"

    async def image_stream_completes_with_usage(self) -> None:
        events = await self.each(
            self.client.images.generate(prompt="a red apple", stream=True, partial_images=2, extra_body=STEPS)
        )
        assert events[-1].type == "image_generation.completed", events
        assert events[-1].usage.output_tokens > 0
        assert base64.b64decode(events[-1].b64_json)[:4] == b"\x89PNG"
        previews = events[:-1]
        assert all(event.type == "image_generation.partial_image" for event in previews), events
        assert [event.partial_image_index for event in previews] == [0, 1]
        assert [event.size for event in previews] == ["128x128"] * 2
        assert all(base64.b64decode(event.b64_json)[:4] == b"\x89PNG" for event in previews)

    async def error_has_param_code_and_request_id(self) -> None:
        error = await self.refused(
            openai.BadRequestError, lambda: self.client.images.generate(prompt="a", size="100x100")
        )
        assert (error.param, error.code, error.type) == ("size", "invalid_request", "invalid_request_error")
        assert "nearest" in error.message
        assert error.request_id.startswith("req_")

    async def unknown_model_is_not_found(self) -> None:
        error = await self.refused(
            openai.NotFoundError, lambda: self.client.images.generate(prompt="a", model="dall-e-3")
        )
        assert error.param == "model"

    # ---- videos

    async def video_is_created_by_multipart_with_all_keys(self) -> None:
        video = await self.call(
            self.client.videos.create(
                prompt="a red apple", seconds="1", size="128x128", extra_body={"num_inference_steps": 2}
            )
        )
        assert (video.object, video.seconds, video.size, video.model) == ("video", "1", "128x128", self.model)
        assert video.status in ("queued", "in_progress", "completed")
        keys = {
            "id", "object", "created_at", "completed_at", "expires_at", "model", "progress", "prompt",
            "remixed_from_video_id", "seconds", "size", "status", "error",
        }  # fmt: skip
        assert set(video.to_dict()) >= keys, video.to_dict()

    async def polling_ends_with_the_video(self) -> None:
        video = await self.call(self.client.videos.create_and_poll(prompt="a red apple", extra_body=VIDEO))
        assert (video.status, video.progress) == ("completed", 100)
        content = await self.call(self.client.videos.download_content(video.id))
        data = await self.call(content.aread() if hasattr(content, "aread") else content.read())
        assert data[4:8] == b"ftyp"
        assert len(data) == int(content.response.headers["content-length"])

    async def content_before_the_end_is_400(self) -> None:
        video = await self.video(num_inference_steps=400)
        error = await self.refused(openai.BadRequestError, lambda: self.client.videos.download_content(video.id))
        assert error.status_code == 400
        await self.call(self.client.videos.delete(video.id))

    async def retrieving_tells_when_to_ask_again(self) -> None:
        video = await self.video(num_inference_steps=400)
        raw = await self.call(self.client.videos.with_raw_response.retrieve(video.id))
        assert int(raw.headers["openai-poll-after-ms"]) > 0
        await self.call(self.client.videos.delete(video.id))

    async def listing_pages(self) -> None:
        made = [(await self.video()).id for _ in range(3)]
        page = await self.call(self.client.videos.list(limit=2, order="desc"))
        assert [video.id for video in page.data] == made[:0:-1]
        assert page.has_more
        everything = await self.each(self.client.videos.list(limit=2, order="asc", after=made[0]))
        assert [video.id for video in everything][:2] == made[1:]

    async def deleting_answers_and_deletes(self) -> None:
        video = await self.video()
        gone = await self.call(self.client.videos.delete(video.id))
        assert (gone.id, gone.object, gone.deleted) == (video.id, "video.deleted", True)
        await self.refused(openai.NotFoundError, lambda: self.client.videos.retrieve(video.id))

    async def unsupported_variant_is_named(self) -> None:
        video = await self.video()
        error = await self.refused(
            openai.BadRequestError, lambda: self.client.videos.download_content(video.id, variant="thumbnail")
        )
        assert error.param == "variant"

    # ---- models

    async def models_are_listed_and_retrieved_with_slashes(self) -> None:
        models = await self.each(self.client.models.list())
        assert [model.id for model in models] == [self.model]
        assert (await self.call(self.client.models.retrieve(self.model))).id == self.model

    async def raw_json_body_makes_a_video_too(self) -> None:
        reply = await self.call(self.client.post("/videos", body={"prompt": "a red apple", **VIDEO}, cast_to=object))
        assert reply["object"] == "video"


class EditRows(Rows):
    """Against a server whose model starts from one picture, 72 pixels wide and 56 high, and makes one as large."""

    photo: Any = None  # a path

    async def edited(self, image: Any, **more: Any) -> Any:
        return await self.call(
            self.client.images.edit(image=image, prompt="as a watercolour", extra_body={**STEPS, "seed": 3}, **more)
        )

    async def a_file_is_edited(self) -> None:
        with open(self.photo, "rb") as file:
            reply = await self.edited(file)
        assert base64.b64decode(reply.data[0].b64_json)[:4] == b"\x89PNG", reply
        assert reply.to_dict()["size"] == "72x56"

    async def a_list_of_one_path_with_a_hostile_name_is_the_same(self) -> None:
        content = pathlib.Path(self.photo).read_bytes()
        one = await self.edited([pathlib.Path(self.photo)])
        other = await self.edited(("../../x", content, "text/plain"), n=2, size="72x56", quality="high")
        assert one.data[0].b64_json == other.data[0].b64_json != other.data[1].b64_json

    async def an_edit_streams(self) -> None:
        with open(self.photo, "rb") as file:
            events = await self.each(
                self.client.images.edit(image=file, prompt="a", stream=True, partial_images=2, extra_body=STEPS)
            )
        assert events[-1].type == "image_edit.completed", events
        assert events[-1].usage.output_tokens > 0
        assert all(event.type == "image_edit.partial_image" for event in events[:-1])

    async def an_edit_comes_at_a_url_as_jpeg(self) -> None:
        with open(self.photo, "rb") as file:
            reply = await self.edited(file, response_format="url", output_format="jpeg", output_compression=50)
        assert urllib.request.urlopen(reply.data[0].url).read()[:2] == b"\xff\xd8"

    async def two_pictures_a_mask_and_no_picture_are_refused_by_name(self) -> None:
        path = pathlib.Path(self.photo)
        error = await self.refused(openai.BadRequestError, lambda: self.edited([path, path]))
        assert (error.param, "1 expected" in error.message) == ("image", True)
        error = await self.refused(openai.BadRequestError, lambda: self.edited(path, mask=path))
        assert error.param == "mask"
        error = await self.refused(openai.BadRequestError, lambda: self.edited(b"no picture"))
        assert error.param == "image"


async def run(kind: str, rows: Rows) -> dict[str, str]:
    found = {}
    for name, row in vars(type(rows)).items():  # its own rows, without those of a base
        if name in ("call", "each", "refused", "video", "edited") or not inspect.iscoroutinefunction(row):
            continue
        check: Callable[[], Awaitable[None]] = getattr(rows, name)
        try:
            await check()
            found[f"{kind} {name}"] = "pass"
        except Exception:  # one row's failure is its result
            found[f"{kind} {name}"] = traceback.format_exc(limit=-3)
    return found


async def main() -> None:
    warnings.simplefilter("ignore", DeprecationWarning)  # the SDK marks videos as deprecated
    url, model, edits, EditRows.photo = sys.argv[1:]
    rows: dict[str, str] = {}
    for kind, make in (("sync", openai.OpenAI), ("async", openai.AsyncOpenAI)):
        rows |= await run(kind, Rows(make(base_url=url + "/v1", api_key="none", max_retries=0), model))
        rows |= await run(kind, EditRows(make(base_url=edits + "/v1", api_key="none", max_retries=0), ""))
    print(json.dumps({"version": openai.__version__, "rows": rows}))


if __name__ == "__main__":
    asyncio.run(main())
