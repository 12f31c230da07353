"""`safelight generate` with each image family's tiny checkpoint, through all processes, on one rank and on two that
share the text encoder, against diffusers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_checkpoint.py"
PROMPT, SEED, STEPS, HEIGHT, WIDTH = "A cat &amp; a  dog, naïve", 11, 3, 48, 80
CASES: dict[str, dict[str, Any]] = {  # by checkpoint: the parameters by diffusers' names
    "flux1-dev": {"guidance_scale": 3.5},
    "qwen-image": {"true_cfg_scale": 4.0, "negative_prompt": "blurry"},
    "z-image": {"guidance_scale": 4.0, "negative_prompt": "blurry"},
}


def make(name: str, folder: Path) -> Path:
    subprocess.run([sys.executable, str(SCRIPT), name, str(folder)], check=True, capture_output=True)
    return folder


def generate(model: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    size = ["--height", str(HEIGHT), "--width", str(WIDTH), "--num-inference-steps", str(STEPS)]
    return subprocess.run(
        [sys.executable, "-m", "safelight", "generate", "--device", "cpu", "--model-path", str(model),
         "--output-path", str(out), "--seed", str(SEED), "--return-frames", *size, *flags],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "ranks"), [("flux1-dev", 1), ("qwen-image", 2), ("z-image", 1), ("z-image", 2)])
def test_a_picture_is_that_of_diffusers(tmp_path: Path, name: str, ranks: int) -> None:
    from diffusers import DiffusionPipeline

    model, parameters = make(name, tmp_path / "model"), CASES[name]
    flags = [part for key, value in parameters.items() for part in ("--" + key.replace("_", "-"), str(value))]
    flags += ["--num-gpus", str(ranks), "--tp-size", str(ranks)]
    ended = generate(model, tmp_path / "out", "--prompt", PROMPT, *flags)
    assert ended.returncode == 0, ended.stderr
    frames = np.load(next((tmp_path / "out").glob("*.npy")))
    torch.set_num_threads(1)
    reference = DiffusionPipeline.from_pretrained(str(model), dtype=torch.float32)  # type: ignore[no-untyped-call]
    reference.set_progress_bar_config(disable=True)
    made = reference(
        prompt=PROMPT, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, output_type="np",
        generator=torch.Generator().manual_seed(SEED), **parameters,
    ).images  # fmt: skip
    assert frames.shape == (1, HEIGHT, WIDTH, 3)
    assert np.abs(frames.astype(int) - np.round(made * 255).astype(int)).max() <= 1
    assert frames.std() > 10, "a picture that is not flat"


def test_an_edit_of_two_pictures_is_as_large_as_asked_for_and_needs_a_picture(tmp_path: Path) -> None:
    model, pictures = make("qwen-image-edit-plus", tmp_path / "model"), []
    for number, colour in enumerate(((200, 30, 30), (30, 30, 200))):
        pictures.append(tmp_path / f"{number}.png")
        Image.new("RGB", (64 + 16 * number, 48), colour).save(pictures[-1])
    brought = [part for path in pictures for part in ("--image-path", str(path))]
    ended = generate(model, tmp_path / "out", "--prompt", "make it rain", *brought)
    assert ended.returncode == 0, ended.stderr
    made = np.load(next((tmp_path / "out").glob("*.npy")))
    assert made.shape == (1, HEIGHT, WIDTH, 3), "as large as asked for, whatever comes in"
    assert made.std() > 10, "a picture that is not flat"
    ended = generate(model, tmp_path / "none", "--prompt", "make it rain")
    assert ended.returncode == 2, "refused before anything starts"
    assert "1 to 3 expected" in ended.stderr
