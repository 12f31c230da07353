"""The frontend process: HTTP on an inherited socket, torch-free. Runs until the supervisor says Shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from typing import Any

import uvicorn
import zmq
from starlette.types import ASGIApp

from safelight.entrypoints.http.app import make_app
from safelight.runtime import transport
from safelight.runtime.messages import ControlHeartbeat, FrontendSpec, Shutdown, ToControlled

BEAT_S = 0.5
KEEP_ALIVE_S = 75  # longer than load balancers keep theirs, which thus never meet a closed connection
CLOSE_S = 2  # for connections that are still open at the end
log = logging.getLogger(__name__)


def main(spec: FrontendSpec) -> None:
    """Raises ModelError when the model's tokenizer cannot be read."""
    app = make_app(spec)
    asyncio.run(_serve(http_server(app), spec))


def http_server(app: ASGIApp) -> uvicorn.Server:
    """As `serve` runs it."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
        server_header=False,
    )
    return uvicorn.Server(config)


async def _serve(server: uvicorn.Server, spec: FrontendSpec) -> None:
    listening = socket.socket(fileno=os.dup(spec.listen_fd))
    context: zmq.Context[Any] = zmq.Context()
    try:
        with transport.connect_dealer(context, spec.endpoints.control, ToControlled) as control:
            beating = asyncio.create_task(_beat(control, server), name="beat")
            await server.serve(sockets=[listening])
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating
    finally:
        context.term()
        listening.close()


async def _beat(control: transport.Channel[ToControlled], server: uvicorn.Server) -> None:
    """Tells the supervisor that the event loop turns, and hears from it."""
    instance = secrets.token_hex(8)
    while True:
        with contextlib.suppress(transport.PeerUnreachable):
            control.send(ControlHeartbeat("frontend", instance, os.getpid()))
        for _ in range(10):
            await asyncio.sleep(BEAT_S / 10)
            for order in control.receive_all():
                if isinstance(order.message, Shutdown):
                    log.info("the frontend stops: %s", order.message.reason)
                    server.should_exit = True
