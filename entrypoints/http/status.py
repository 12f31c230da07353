"""/health, /ready, /metrics."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from safelight.entrypoints.http import replies
from safelight.entrypoints.http.schemas import Readiness
from safelight.entrypoints.http.service import Service


async def health(request: Request) -> Response:
    """GET /health: 200 while every process lives and answers, 503 otherwise."""
    service: Service = request.app.state.service
    found = service.monitor.health()
    return replies.json(found, 200 if found.status == "ok" else 503)


async def ready(request: Request) -> Response:
    """GET /ready: 200 when a job would run, 503 otherwise."""
    service: Service = request.app.state.service
    status, is_ready = service.monitor.status, service.monitor.ready
    reply = Readiness(
        ready=is_ready,
        draining=status is not None and status.draining,
        queued=status.queued if status else 0,
        running=status.running if status else 0,
    )
    return replies.json(reply, 200 if is_ready else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics, in Prometheus' text format."""
    service: Service = request.app.state.service
    page = service.metrics.page(service.monitor.status, service.monitor.ready)
    return Response(page, media_type="text/plain; version=0.0.4")
