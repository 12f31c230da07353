"""The only owner of HTTP status codes: from Safelight's errors, and Starlette's, to OpenAI's error body.

`x-should-retry: false` is sent where the OpenAI SDK would try again by the status (408, 409, 429, 5xx) and cannot win.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from safelight.entrypoints.http.schemas import ErrorBody, ErrorReply
from safelight.runtime.errors import SafelightError

MAX_RETRY_AFTER_S = 120  # the OpenAI SDK does not wait longer


@dataclass(frozen=True, slots=True)
class _Kind:
    status: int
    type: str
    retry: bool = False


_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "invalid_request": _Kind(400, "invalid_request_error"),
        "too_large": _Kind(400, "invalid_request_error"),
        "not_found": _Kind(404, "invalid_request_error"),
        "conflict": _Kind(409, "invalid_request_error"),
        "cancelled": _Kind(409, "invalid_request_error"),
        "overloaded": _Kind(429, "rate_limit_error", retry=True),
        "job_failed": _Kind(500, "server_error"),
        "poisoned": _Kind(500, "server_error"),
        "worker_lost": _Kind(503, "server_error", retry=True),
        "startup_error": _Kind(503, "server_error", retry=True),
    }
)
_OTHER = _Kind(500, "server_error")
_TYPE_OF_STATUS = MappingProxyType({401: "authentication_error", 429: "rate_limit_error"})


class Unauthorized(SafelightError):
    """No API key, or a wrong one."""

    code = "invalid_api_key"


def reply(status: int, body: ErrorBody, headers: Mapping[str, str] | None = None) -> Response:
    """OpenAI's error reply."""
    content = msgspec.json.encode(ErrorReply(body))
    return Response(content, status, headers, media_type="application/json")


def of_safelight(error: SafelightError) -> Response:
    """The reply for an error of ours."""
    if isinstance(error, Unauthorized):
        body = ErrorBody(error.message, "authentication_error", None, error.code)
        return reply(401, body, {"www-authenticate": "Bearer"})
    kind = _KINDS.get(error.code, _OTHER)
    headers: dict[str, str] = {}
    status = kind.status
    if error.code == "overloaded" and error.retry_after_s is None:  # it shuts down: another server may be there soon
        status = 503
    if kind.retry:
        wait = error.retry_after_s if error.retry_after_s is not None else 5.0
        headers["retry-after"] = str(max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait))))
    elif status in (408, 409) or status >= 500:
        headers["x-should-retry"] = "false"
    return reply(status, ErrorBody(error.message, kind.type, error.param, error.code), headers)


def of_status(
    status: int, message: str, headers: Mapping[str, str] | None = None, param: str | None = None
) -> Response:
    """The reply for what HTTP itself forbids: no such path, another method, too large a body."""
    code = HTTPStatus(status).name.lower()
    kind = _TYPE_OF_STATUS.get(status, "invalid_request_error" if status < 500 else "server_error")
    never = {"x-should-retry": "false"} if status in (408, 409) or status >= 500 else {}
    return reply(status, ErrorBody(message, kind, param, code), {**never, **(headers or {})})


def on_safelight_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, SafelightError)
    return of_safelight(error)


def on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"there is nothing at {request.method} {request.url.path}; /openapi.json lists what there is"
    elif error.status_code == 405:
        message = f"{request.method} is not a method of {request.url.path}"
    return of_status(error.status_code, message, error.headers)


def on_exception(_request: Request, error: Exception) -> Response:
    """A fault of ours; the traceback is in the server's log."""
    return of_status(500, f"the server failed to handle this request ({type(error).__name__}); see its log")
