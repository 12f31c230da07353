"""/v1/videos: jobs that outlive their client and every process."""

from __future__ import annotations

import base64
import math
import re
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from types import MappingProxyType
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from safelight.entrypoints.http import bodies, replies
from safelight.entrypoints.http.pictures import Brought, urls_of
from safelight.entrypoints.http.schemas import (
    Video,
    VideoDeleted,
    VideoError,
    VideoList,
    VideoPreview,
    VideoProgress,
    VideoRequest,
)
from safelight.entrypoints.http.service import Service
from safelight.entrypoints.previews import Preview
from safelight.runtime.errors import InvalidRequest, NotFound, SafelightError
from safelight.runtime.messages import Event, JobInfo, JobState, ListJobs, Stage, Status

ORIGIN = "videos"
OUTPUT_FORMATS: Mapping[str, Literal["png", "jpeg", "webp"]] = MappingProxyType(
    {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
)
MAX_LIST = 100
_POLL_MS = (100, 15_000)  # however far the end is: it may come sooner than predicted
_ID = re.compile(r"[0-9A-Za-z]{26}")


async def create_video(request: Request) -> Response:
    """POST /v1/videos: answers at once with the queued video."""
    service: Service = request.app.state.service
    body, files, warnings = await bodies.read_with_files(request, VideoRequest)
    warnings += service.translator.warnings(body)
    waiting = await service.submit(request, body, Brought("input_reference", files, urls_of(body.input_reference)))
    state = await service.client.job(waiting.job, waiting.owner)
    return _reply(service, state, bodies.warning_header(warnings))


async def list_videos(request: Request) -> Response:
    """GET /v1/videos."""
    service: Service = request.app.state.service
    order, limit = _parameter(request, "order", "desc"), _parameter(request, "limit", "20")
    after = _parameter(request, "after", "") or None
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order is asc or desc, got {order[:80]!r}", param="order")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 5 and 1 <= int(limit) <= MAX_LIST):
        raise InvalidRequest(f"limit is 1 to {MAX_LIST}, got {limit[:80]!r}", param="limit")
    query = ListJobs(secrets.token_hex(8), request.state.owner, ORIGIN, after, int(limit), order == "desc")
    try:
        page = await service.client.jobs(query)
    except NotFound:
        raise InvalidRequest(f"after: there is no video {str(after)[:80]!r}", param="after") from None
    data = [_video(service, state) for state in page.jobs]
    ids = [video.id for video in data]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return replies.json(VideoList(data=data, first_id=first, last_id=last, has_more=page.has_more))


async def get_video(request: Request) -> Response:
    """GET /v1/videos/{id}."""
    return _reply(request.app.state.service, await _state(request))


async def delete_video(request: Request) -> Response:
    """DELETE /v1/videos/{id}: cancels what is not done yet, and deletes the rest."""
    service: Service = request.app.state.service
    state = await _state(request)
    await service.client.forget(state.job, request.state.owner)
    return replies.json(VideoDeleted(id=state.job))


async def video_content(request: Request) -> Response:
    """GET /v1/videos/{id}/content: the file; 400 as long as there is none."""
    state = await _state(request)
    variant = _parameter(request, "variant", "video")
    if variant != "video":
        raise InvalidRequest(f"variant: only video is there, got {variant[:80]!r}", param="variant")
    if state.status is not Status.COMPLETED or not state.artifacts:
        now = state.status.value if state.status else state.stage.value
        raise InvalidRequest(f"the video is not ready: it is {now}", param="id")
    return await replies.file(request, state.artifacts[0])


async def video_events(request: Request) -> Response:
    """GET /v1/videos/{id}/events: every step as it happens, and the previews that were asked for; the last event is
    the video."""
    service: Service = request.app.state.service
    state = await _state(request)
    return replies.events(_events(service, state.job, request.state.owner))


async def _events(service: Service, job: str, owner: str) -> AsyncGenerator[bytes]:
    try:
        async for event in service.client.events(job, owner):
            if isinstance(event, Preview):
                yield replies.event("video.partial_image", _preview(event))
            elif event.status is not None:
                state = await service.client.job(job, owner)
                yield replies.event(f"video.{_status(state)}", _video(service, state))
            elif event.progress is not None:
                yield replies.event("video.progress", _progress(event))
    except SafelightError as error:
        yield replies.error_event(error)


def _preview(preview: Preview) -> VideoPreview:
    return VideoPreview(
        id=preview.job,
        b64_json=base64.b64encode(preview.data).decode(),
        partial_image_index=preview.number,
        created_at=int(time.time()),
        output_format=OUTPUT_FORMATS[preview.media_type],
        size=f"{preview.width}x{preview.height}",
        step=preview.step,
    )


def _progress(event: Event) -> VideoProgress:
    p = event.progress
    assert p is not None, "checked"
    return VideoProgress(
        id=event.job, stage=p.stage.value, index=p.index, step=p.step, steps=p.steps, position=p.position,
        eta_ms=p.eta_ms,
    )  # fmt: skip


async def _state(request: Request) -> JobState:
    """Raises NotFound."""
    service: Service = request.app.state.service
    job = request.path_params["id"]
    if not _ID.fullmatch(job):
        raise NotFound(f"there is no video {job[:80]!r}")
    state = await service.client.job(job, request.state.owner)
    if state.info is None or state.info.origin != ORIGIN:
        raise NotFound(f"there is no video {job!r}")
    return state


def _parameter(request: Request, name: str, default: str) -> str:
    values = request.query_params.getlist(name)
    if len(values) > 1:
        raise InvalidRequest(f"{name} is there {len(values)} times", param=name)
    return values[0] if values else default


def _reply(service: Service, state: JobState, headers: dict[str, str] | None = None) -> Response:
    """A video, with its predicted time left: when it is worth asking again."""
    video = _video(service, state)
    headers = headers or {}
    if video.status in ("queued", "in_progress"):
        eta = state.eta_ms if state.eta_ms is not None else 1000.0
        headers = {**headers, "openai-poll-after-ms": str(math.ceil(min(_POLL_MS[1], max(_POLL_MS[0], eta))))}
    return replies.json(video, headers=headers)


def _status(state: JobState) -> str:
    if state.status is None:
        return "queued" if state.stage is Stage.QUEUED else "in_progress"
    return "completed" if state.status is Status.COMPLETED else "failed"


def _video(service: Service, state: JobState) -> Video:
    info = state.info
    assert info is not None, "the scheduler tells it of every job"
    error = None
    if _status(state) == "failed":
        code, message = (state.error.code, state.error.message) if state.error else ("internal", "it failed")
        error = VideoError(code=code, message=message)
    values = {
        "id": state.job,
        "created_at": int(info.created_at),
        "completed_at": int(info.ended_at) if info.ended_at and state.status is Status.COMPLETED else None,
        "expires_at": int(info.expires_at) if info.expires_at else None,
        "model": service.translator.model.id,
        "progress": int(100 * state.progress),
        "prompt": info.prompt,
        "seconds": seconds(info),
        "size": f"{info.width}x{info.height}",
        "status": _status(state),
        "error": error,
    }
    return msgspec.convert(values, Video, from_attributes=True)


def seconds(info: JobInfo) -> str:
    """From the first frame to the last."""
    return f"{max(1, info.num_frames - 1) / info.fps:.4g}"
