"""A real server on a tiny random checkpoint: every process of the design, started for real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, Start

from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.client import Client
from safelight.runtime.launch.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan checkpoint with random weights."""
    target = tmp_path_factory.mktemp("model") / "tiny"
    script = ROOT / "scripts" / "make_checkpoint.py"
    subprocess.run([sys.executable, str(script), "wan2.1-t2v", str(target), "--size", "tiny"], check=True, cwd=ROOT)
    return target


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Start]:
    """Starts a server with ServerArgs fields as keywords; it is stopped after the test."""
    with ExitStack() as stack:

        def starter(model: Path = tiny_model, slot_bytes: int = 1 << 20, **args: Any) -> Running:
            settings = ServerArgs(model_path=str(model), device=os.environ.get("E2E_DEVICE", "cpu"), **args)
            server = stack.enter_context(Supervisor(settings, model, slot_bytes))
            client = stack.enter_context(Client(server.endpoints))
            server.wait_ready(90)
            return Running(server, client)

        yield starter
