"""The outermost layer: request ids, API keys, the size of bodies, counting. Everything else is inside."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safelight.entrypoints.http import errors
from safelight.entrypoints.http.metrics import Metrics

OPEN_PATHS = ("/health", "/ready")  # for probes: they tell nothing worth a key
DEFAULT_OWNER = "local"


class Gate:
    """`api_keys`: (owner, key); without any, everybody is the default owner. `larger`: by path."""

    def __init__(
        self,
        app: ASGIApp,
        api_keys: Sequence[tuple[str, str]],
        max_body: int,
        metrics: Metrics,
        larger: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._app, self._max_body, self._metrics, self._larger = app, max_body, metrics, larger
        self._api_keys = [(owner, key.encode()) for owner, key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        request_id = f"req_{secrets.token_hex(12)}"

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._admit(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("endpoint"), "__name__", "none")
            self._metrics.replied(route, _method(scope), status, time.monotonic() - started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        owner = self._owner(scope["path"], headers)
        if owner is None:
            refusal = errors.of_safelight(
                errors.Unauthorized(
                    "an API key expected in the header `Authorization: Bearer KEY`; it is missing or wrong"
                )
            )
            await refusal(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        most = self._larger.get(scope["path"], self._max_body)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            await errors.of_status(413, _too_large(most))(scope, receive, send)
            return
        await self._app(scope, _limited(receive, most), send)

    def _owner(self, path: str, headers: Headers) -> str | None:
        """Compares with every key, in constant time each: how long it takes tells nothing."""
        if not self._api_keys or path in OPEN_PATHS:
            return DEFAULT_OWNER
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
        matches = [owner for owner, known in self._api_keys if hmac.compare_digest(known, key)]
        return matches[0] if matches else None


def _limited(receive: Receive, most: int) -> Receive:
    total = 0

    async def limited() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > most:
            raise HTTPException(413, _too_large(most))
        return message

    return limited


def _too_large(most: int) -> str:
    return f"this server takes requests of at most {most} bytes here"


def _method(scope: Scope) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    return scope["method"] if scope["method"] in known else "other"
