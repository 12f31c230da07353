"""Replies: structs as JSON, server-sent events, files with ranges. There is no other way to send a body."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from safelight.entrypoints.http import errors
from safelight.entrypoints.http.schemas import ErrorBody, ErrorReply
from safelight.runtime.errors import NotFound, SafelightError
from safelight.runtime.messages import Artifact

KEEP_ALIVE_S = 15.0
_ENCODER = msgspec.json.Encoder()
_RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?")


def json(body: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_ENCODER.encode(body), status, headers, media_type="application/json")


def event(name: str, body: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"event: " + name.encode() + b"\ndata: " + _ENCODER.encode(body) + b"\n\n"


def error_event(error: SafelightError) -> bytes:
    """What the OpenAI SDK raises in the middle of a stream."""
    return event("error", ErrorReply(ErrorBody(error.message, "server_error", error.param, error.code)))


def events(stream: AsyncGenerator[bytes], headers: Mapping[str, str] | None = None) -> Response:
    """`stream` as server-sent events; a comment every KEEP_ALIVE_S keeps proxies patient."""
    return StreamingResponse(
        _kept_alive(stream), headers={"cache-control": "no-store", **(headers or {})}, media_type="text/event-stream"
    )


async def _kept_alive(stream: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    following: asyncio.Future[bytes] | None = None
    try:
        while True:
            if following is None:
                following = asyncio.ensure_future(anext(stream))
            done, _ = await asyncio.wait((following,), timeout=KEEP_ALIVE_S)
            if not done:
                yield b": still at work\n\n"
                continue
            ready, following = following, None
            try:
                yield ready.result()
            except StopAsyncIteration:
                return
    finally:
        if following is not None:
            following.cancel()
            await asyncio.wait((following,))
        await stream.aclose()


async def file(request: Request, artifact: Artifact) -> Response:
    """A finished file, whole or the range asked for. Raises NotFound when it is gone."""
    try:
        stat = await asyncio.to_thread(os.stat, artifact.path)
    except OSError:
        raise NotFound("the file is not there any more: it was deleted, or it expired") from None
    found = _RANGE.fullmatch(request.headers.get("range", "").strip().lower())
    if found is None or (found[1] is None and found[2] is None) or _is_backwards(found):
        request.scope["headers"] = [
            h for h in request.scope["headers"] if h[0] != b"range"
        ]  # ignored, as RFC 9110 says
    elif (found[1] is not None and int(found[1]) >= stat.st_size) or (found[1] is None and int(found[2]) == 0):
        message = f"the file has {stat.st_size} bytes; range {request.headers['range'][:60]!r} is outside of it"
        return errors.of_status(416, message, {"content-range": f"bytes */{stat.st_size}"}, "Range")
    return FileResponse(
        artifact.path, media_type=artifact.media_type, filename=Path(artifact.path).name, stat_result=stat,
        content_disposition_type="inline",
    )  # fmt: skip


def _is_backwards(found: re.Match[str]) -> bool:
    return found[1] is not None and found[2] is not None and int(found[2]) < int(found[1])
