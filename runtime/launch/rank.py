"""What a forked rank runs. Importable without torch, because the supervisor names it as the target."""

from __future__ import annotations

from multiprocessing.connection import Connection


def run_rank(spec_bytes: bytes, status: Connection) -> None:
    """The process main of one rank, in the child."""
    from safelight.runtime.worker.main import main

    main(spec_bytes, status)
