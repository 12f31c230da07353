"""/v1/images."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from safelight.configs.families import FAMILIES
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.http import bodies, replies
from safelight.entrypoints.http.pictures import Brought, urls_of
from safelight.entrypoints.http.schemas import (
    Image,
    ImageEditRequest,
    ImageEvent,
    ImageRequest,
    ImagesReply,
    PartialImage,
    TokenDetails,
    Usage,
)
from safelight.entrypoints.http.service import Service, Waiting, checked
from safelight.entrypoints.previews import Preview
from safelight.runtime.errors import InvalidRequest, JobFailed, NotFound, SafelightError
from safelight.runtime.messages import Artifact, GenerationRequest

_ID = re.compile(r"([0-9A-Za-z]{26})(?:-(\d{1,3}))?")


async def create_image(request: Request) -> Response:
    """POST /v1/images/generations: answers when the pictures are there; the client's end cancels them."""
    body, warnings = await bodies.read(request, ImageRequest)
    return await _answer(request, body, Brought("image"), warnings)


async def edit_image(request: Request) -> Response:
    """POST /v1/images/edits: as a generation, from pictures that the request brings."""
    body, files, warnings = await bodies.read_with_files(request, ImageEditRequest)
    inline = urls_of(body.image, body.images)
    addresses = urls_of(body.url, body.urls)
    brought = Brought("url" if addresses and not (files or inline) else "image", files, (*inline, *addresses))
    return await _answer(request, body, brought, warnings)


async def _answer(request: Request, body: ImageRequest, brought: Brought, warnings: list[str]) -> Response:
    service: Service = request.app.state.service
    if body.partial_images and not body.stream:
        raise InvalidRequest("partial_images needs stream: true", param="partial_images")
    waiting = await service.submit(request, body, brought)
    headers = bodies.warning_header(warnings + service.translator.warnings(body))
    if body.stream:
        return replies.events(_stream(service, waiting, body), headers)
    async with service.attached(waiting):
        event = await service.completed(waiting, request)
    files = [await _picture(request, a, waiting, inline=body.response_format == "b64_json") for a in event.artifacts]
    reply = ImagesReply(
        created=int(time.time()),
        id=waiting.job,
        data=files,
        output_format=body.output_format,
        size=_size(waiting.request),
        usage=usage(service, waiting.request),
    )
    return replies.json(reply, headers=headers)


async def image_content(request: Request) -> Response:
    """GET /v1/images/{id}/content: the file of one picture."""
    service: Service = request.app.state.service
    found = _ID.fullmatch(request.path_params["id"])
    if found is None:
        raise NotFound(f"there is no picture {request.path_params['id'][:80]!r}")
    state = await service.client.job(found[1], request.state.owner)
    for artifact in state.artifacts:
        if artifact.index == int(found[2] or 0) and state.info is not None and state.info.origin == "images":
            return await replies.file(request, artifact)
    raise NotFound(f"there is no picture {found[0]!r} (yet)")


async def _stream(service: Service, waiting: Waiting, body: ImageRequest) -> AsyncGenerator[bytes]:
    async with service.attached(waiting):
        try:
            async for event in service.client.events(waiting.job, waiting.owner):
                if isinstance(event, Preview):
                    yield replies.event("image_generation.partial_image", _partial(event, body))
                elif event.status is not None:
                    for artifact in checked(event).artifacts:
                        yield replies.event(body.completed, await _completed(service, waiting, body, artifact))
        except SafelightError as error:
            yield replies.error_event(error)


def _partial(preview: Preview, body: ImageRequest) -> PartialImage:
    return PartialImage(
        b64_json=base64.b64encode(preview.data).decode(),
        partial_image_index=preview.number,
        created_at=int(time.time()),
        output_format=body.output_format,
        size=f"{preview.width}x{preview.height}",
        index=preview.index,
        step=preview.step,
    )


async def _completed(service: Service, waiting: Waiting, body: ImageRequest, artifact: Artifact) -> ImageEvent:
    return ImageEvent(
        type=body.completed,
        b64_json=await asyncio.to_thread(_base64, artifact),
        created_at=int(time.time()),
        output_format=body.output_format,
        size=_size(waiting.request),
        usage=usage(service, waiting.request),
    )


async def _picture(request: Request, artifact: Artifact, waiting: Waiting, *, inline: bool) -> Image:
    name, seed = f"{waiting.job}-{artifact.index}", waiting.request.seed + artifact.index
    if inline:
        return Image(id=name, b64_json=await asyncio.to_thread(_base64, artifact), seed=seed)
    return Image(id=name, url=f"{request.base_url}v1/images/{name}/content", seed=seed)


def _base64(artifact: Artifact) -> str:
    try:
        return base64.b64encode(Path(artifact.path).read_bytes()).decode()
    except OSError as error:
        raise JobFailed(f"the finished picture cannot be read: {error}") from error


def _size(request: GenerationRequest) -> str:
    return f"{request.width}x{request.height}"


def usage(service: Service, request: GenerationRequest) -> Usage:
    """Text tokens in, latent tokens out."""
    spec = service.translator.spec
    text = sum(len(ids) for ids in request.token_ids.values())
    pictures = FAMILIES[spec.family].profile(spec, SamplingParams.of(request)).tokens * request.num_outputs
    details = TokenDetails(image_tokens=0, text_tokens=text)
    return Usage(input_tokens=text, output_tokens=pictures, total_tokens=text + pictures, input_tokens_details=details)
