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
from PIL import Image
from running_server import Running, Start
from served import Served, serve

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


@pytest.fixture(scope="session")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A tiny pipeline that starts from a picture, served as the documentation says, and its working directory."""
    import diffusers_checkpoints

    folder = tmp_path_factory.mktemp("editor")
    diffusers_checkpoints.write("stable_diffusion_img2img", folder / "sd-img2img")
    Image.effect_mandelbrot((72, 56), (-2, -1.5, 1, 1.5), 30).convert("RGB").save(folder / "photo.jpg")
    flags = ("--model-path", "./sd-img2img", "--state-dir", "edit-state", "--allow-url-inputs", "--max-input-mb", "2")
    with serve(*flags, cwd=folder) as served:
        yield served, folder


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
