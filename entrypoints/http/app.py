"""The ASGI application: routes, errors and what lives as long as the server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from safelight.entrypoints.async_client import AsyncClient
from safelight.entrypoints.http import errors
from safelight.entrypoints.http.addresses import UrlPolicy
from safelight.entrypoints.http.gate import Gate
from safelight.entrypoints.http.metrics import Metrics
from safelight.entrypoints.http.monitor import Monitor
from safelight.entrypoints.http.openapi import document
from safelight.entrypoints.http.pictures import Intake
from safelight.entrypoints.http.routes import operations, routes
from safelight.entrypoints.http.service import ClientGone, Service
from safelight.entrypoints.http.translate import Translator
from safelight.runtime.errors import SafelightError
from safelight.runtime.inputs import InputStore
from safelight.runtime.messages import FrontendSpec


def make_app(spec: FrontendSpec, policy: UrlPolicy | None = None) -> ASGIApp:
    """The application for one server; `policy` in place of what its flags say. Raises ModelError when its model cannot
    be served."""
    translator, metrics, parent = Translator(spec.model, spec.limits), Metrics(), os.getppid()
    table = operations()
    openapi = msgspec.json.encode(document(table, keys=bool(spec.api_keys)))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncClient(spec.endpoints) as client:
            monitor = Monitor(client, parent)
            intake = Intake(InputStore(Path(spec.input_dir)), policy or UrlPolicy(spec.allow_url_inputs))
            app.state.service = Service(client, translator, monitor, metrics, intake)
            app.state.started_at = int(time.time())
            asking = asyncio.create_task(monitor.run(), name="monitor")
            try:
                yield
            finally:
                await app.state.service.settle()
                intake.close()
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking

    async def describe(_request: Request) -> Response:
        return Response(openapi, media_type="application/json")

    app = Starlette(
        routes=[*routes(table), Route("/openapi.json", describe)],
        lifespan=lifespan,
        exception_handlers={
            SafelightError: errors.on_safelight_error,
            HTTPException: errors.on_http_exception,
            ClientGone: _on_client_gone,
            Exception: errors.on_exception,
        },
    )
    app.router.redirect_slashes = False
    limits = spec.limits
    larger = dict.fromkeys((operation.path for operation in table if operation.files), limits.max_input_bytes)
    return Gate(app, spec.api_keys, limits.max_body_bytes, metrics, larger)


def _on_client_gone(_request: Request, _error: Exception) -> Response:
    """Nobody reads it; the status is what nginx calls it in its log."""
    return Response(status_code=499)
