"""What cannot start says why in one message, exits non-zero, and leaves nothing running."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running_server import Start

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def generate(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safelight", "generate", "--prompt", "a cat", "--device", "cpu", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def edit(path: Path, key: str, value: object) -> None:
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


WEIGHTS = "diffusion_pytorch_model.safetensors"
BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda m: shutil.rmtree(m), "model directory expected"),
    "no index": (lambda m: (m / "model_index.json").unlink(), "model_index.json"),
    "broken index": (lambda m: (m / "model_index.json").write_text("{"), "model_index.json"),
    "unknown pipeline": (lambda m: edit(m / "model_index.json", "_class_name", "OtherPipeline"), "OtherPipeline"),
    "truncated transformer": (lambda m: truncate(m / "transformer" / WEIGHTS), "transformer"),
    "no transformer weights": (lambda m: (m / "transformer" / WEIGHTS).unlink(), "transformer"),
    "other transformer width": (lambda m: edit(m / "transformer/config.json", "ffn_dim", 96), "shape"),
    "no text encoder weights": (lambda m: (m / "text_encoder" / "model.safetensors").unlink(), "text_encoder"),
    "truncated vae": (lambda m: truncate(m / "vae" / WEIGHTS), "vae"),
    "no vae config": (lambda m: (m / "vae" / "config.json").unlink(), "vae"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "tokenizer"),
    "unsupported sampler": (lambda m: edit(m / "scheduler/scheduler_config.json", "solver_order", 7), "solver_order"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_model_is_refused_with_one_message(tiny_model: Path, tmp_path: Path, name: str) -> None:
    damage, expected = BREAKS[name]
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    damage(model)
    ended = generate("--model-path", str(model), "--output-path", str(tmp_path / "out"))
    assert ended.returncode == 1, ended
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_too_little_shared_memory_is_refused_with_the_figures(tiny_model: Path, tmp_path: Path) -> None:
    ended = generate(
        "--model-path", str(tiny_model), "--height", "32", "--width", "32", "--frame-slots", "900000000",
        "--output-path", str(tmp_path),
    )  # fmt: skip
    assert ended.returncode == 1
    assert "frame slots need" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_second_server_on_the_same_state_folder_is_refused(start: Start, tiny_model: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    start(state_dir=str(state))
    ended = generate(
        "--model-path", str(tiny_model), "--height", "32", "--width", "32", "--num-frames", "1",
        "--state-dir", str(state), "--output-path", str(tmp_path / "out"),
    )  # fmt: skip
    assert ended.returncode == 1, ended
    assert "journal" in ended.stderr or "state" in ended.stderr
    assert "Traceback" not in ended.stderr
