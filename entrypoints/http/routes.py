"""Every operation of the service: the routes and /openapi.json are made of this table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from safelight.entrypoints.http import images, models, schemas, status, videos

Handler = Callable[[Request], Awaitable[Response]]
JSON, SSE, TEXT, BINARY = "application/json", "text/event-stream", "text/plain", "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Parameter:
    """In the query, unless it is part of the path."""

    name: str
    schema: Mapping[str, Any]
    description: str


@dataclass(frozen=True, slots=True)
class Operation:
    """`replies`: the media types of a success, with the struct of JSON ones. `also`: of further statuses."""

    method: str
    path: str
    handler: Handler
    replies: Mapping[str, type[msgspec.Struct] | None]
    body: type[msgspec.Struct] | None = None
    forms: bool = False
    files: tuple[str, ...] = ()  # fields of the body that are files in a form
    parameters: tuple[Parameter, ...] = ()
    also: Mapping[int, type[msgspec.Struct] | None] = field(default_factory=dict)
    is_open: bool = False

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip().splitlines()[0]


_LIST = (
    Parameter("after", {"type": "string"}, "the last id of the page before"),
    Parameter(
        "limit", {"type": "integer", "minimum": 1, "maximum": videos.MAX_LIST}, "videos of a page, 20 unless said"
    ),
    Parameter("order", {"type": "string", "enum": ["asc", "desc"]}, "by creation"),
)
_VARIANT = (Parameter("variant", {"type": "string", "enum": ["video"]}, "what of it"),)
_MEDIA = {"image/png": None, "image/jpeg": None, "image/webp": None}


def operations() -> tuple[Operation, ...]:
    """All but /openapi.json itself."""
    video, health, readiness = {JSON: schemas.Video}, schemas.Health, schemas.Readiness
    return (
        Operation(
            "POST", "/v1/images/generations", images.create_image, {JSON: schemas.ImagesReply, SSE: None},
            body=schemas.ImageRequest, forms=True,
        ),
        Operation(
            "POST", "/v1/images/edits", images.edit_image, {JSON: schemas.ImagesReply, SSE: None},
            body=schemas.ImageEditRequest, forms=True, files=("image", "image[]"),
        ),
        Operation("GET", "/v1/images/{id}/content", images.image_content, _MEDIA, also={206: None}),
        Operation(
            "POST", "/v1/videos", videos.create_video, video, body=schemas.VideoRequest, forms=True,
            files=("input_reference",),
        ),
        Operation("GET", "/v1/videos", videos.list_videos, {JSON: schemas.VideoList}, parameters=_LIST),
        Operation("GET", "/v1/videos/{id}", videos.get_video, video),
        Operation("DELETE", "/v1/videos/{id}", videos.delete_video, {JSON: schemas.VideoDeleted}),
        Operation(
            "GET", "/v1/videos/{id}/content", videos.video_content, {"video/mp4": None, "image/webp": None},
            parameters=_VARIANT, also={206: None},
        ),
        Operation("GET", "/v1/videos/{id}/events", videos.video_events, {SSE: None}),
        Operation("GET", "/v1/models", models.list_models, {JSON: schemas.ModelList}),
        Operation("GET", "/v1/models/{model:path}", models.get_model, {JSON: schemas.Model}),
        Operation("GET", "/models", models.model_info, {JSON: schemas.ModelInfo}),
        Operation("GET", "/health", status.health, {JSON: health}, also={503: health}, is_open=True),
        Operation("GET", "/ready", status.ready, {JSON: readiness}, also={503: readiness}, is_open=True),
        Operation("GET", "/metrics", status.metrics, {TEXT: None}),
    )  # fmt: skip


def routes(table: tuple[Operation, ...]) -> list[Route]:
    """One route a path, so that a wrong method is told all that are right."""
    by_path: dict[str, dict[str, Handler]] = defaultdict(dict)
    for operation in table:
        by_path[operation.path][operation.method] = operation.handler
    return [Route(path, _dispatcher(handlers), methods=list(handlers)) for path, handlers in by_path.items()]


def _dispatcher(handlers: Mapping[str, Handler]) -> Handler:
    async def dispatch(request: Request) -> Response:
        handler = handlers["GET" if request.method == "HEAD" else request.method]
        request.scope["endpoint"] = handler  # what the metrics name
        return await handler(request)

    return dispatch
