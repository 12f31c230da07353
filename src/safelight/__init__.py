"""Safelight: a serving runtime for image and video diffusion transformers."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Engine", "Preview", "__version__"]

if TYPE_CHECKING:
    from safelight.entrypoints.async_sessions import AsyncClient
    from safelight.entrypoints.previews import Preview
    from safelight.entrypoints.sessions import Client, Engine


def __getattr__(name: str) -> Any:  # late: workers import this package too
    if name in ("Client", "Engine"):
        from safelight.entrypoints import sessions

        return getattr(sessions, name)
    if name == "AsyncClient":
        from safelight.entrypoints import async_sessions

        return async_sessions.AsyncClient
    if name == "Preview":
        from safelight.entrypoints import previews

        return previews.Preview
    raise AttributeError(f"module 'safelight' has no attribute {name!r}")
