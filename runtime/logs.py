"""stdlib logging with the role in every line. One line per lifecycle event; per-step data is never logged."""

from __future__ import annotations

import logging
import sys


def configure(role: str, level: str = "warning") -> None:
    """Sends the `safelight` loggers of this process to stderr as `time role level: message`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {role} %(levelname)s: %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("safelight")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
