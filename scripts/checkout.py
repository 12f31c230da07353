"""Which commit a bench's figures are of."""

from __future__ import annotations

import subprocess


def commit() -> str:
    """The checkout's commit, or "unknown" outside git."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
