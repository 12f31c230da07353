"""`safelight generate` as its users run it: pictures, videos, prompt files, Ctrl-C in the middle, a killed parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from running_server import alive

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


@pytest.fixture
def private_tmp(tmp_path: Path) -> Iterator[Path]:
    """A TMPDIR of this test alone, short enough for socket paths."""
    with tempfile.TemporaryDirectory(prefix="sl-") as folder:
        yield Path(folder)


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "safelight", "generate", "--device", os.environ.get("E2E_DEVICE", "cpu"), *flags]


def generate(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=170)


def small(model: Path, out: Path, *flags: str) -> list[str]:
    size = ["--height", "48", "--width", "32", "--num-inference-steps", "4"]
    return ["--model-path", str(model), "--output-path", str(out), *size, *flags]


def frames_of(path: Path) -> list[tuple[int, int]]:
    with av.open(str(path)) as container:
        return [(frame.height, frame.width) for frame in container.decode(video=0)]


def descendants(root: int) -> set[int]:
    """All processes below `root`, by the kernel's parent links."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found: set[int] = set()
    frontier = {root}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found


def wait_gone(pids: set[int], timeout_s: float = 10.0) -> set[int]:
    deadline = time.monotonic() + timeout_s
    while (left := {pid for pid in pids if alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_the_first_command_makes_a_picture_with_the_built_in_model(tmp_path: Path) -> None:
    ended = generate("--prompt", "a red apple on a blue background", "--seed", "4", "--output-path", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "Fatal" not in ended.stderr
    path = Path(ended.stdout.splitlines()[-1])
    with Image.open(path) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (128, 128), "RGB")
        corner = picture.getpixel((3, 3))
    assert isinstance(corner, tuple)
    assert corner[2] > max(corner[0], corner[1]), f"a blue background expected, got {corner}"


def alike(one: Path, other: Path) -> float:
    """Correlation of two pictures, both brought to 16x16."""
    small = []
    for path in (one, other):
        with Image.open(path) as picture:
            small.append(np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.BOX)).ravel())
    return float(np.corrcoef(np.stack(small))[0, 1])


def test_previews_show_the_picture_that_is_being_made(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple on a blue background\na cat on a pink background\n")
    flags = ["--prompt-path", str(prompts), "--seed", "1", "--num-inference-steps", "9", "--previews", "2", "--json"]
    ended = generate(*flags, "--output-path", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    pictures = {line["number"]: Path(line["paths"][0]) for line in lines if line["event"] == "completed"}
    for number, picture in pictures.items():
        previews = [line for line in lines if line["event"] == "preview" and line["number"] == number]
        assert [(line["index"], line["step"]) for line in previews] == [(0, 3), (0, 6)]
        last = Path(previews[-1]["path"])
        assert last.name == f"{picture.stem}-step-6.png"
        with Image.open(last) as preview:
            assert (preview.format, preview.size) == ("PNG", (128, 128))
        assert alike(last, picture) > 0.9
        assert alike(last, pictures[3 - number]) < alike(last, picture) - 0.2


def test_a_video_has_the_frames_and_size_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    flags = small(tiny_model, tmp_path, "--num-frames", "9", "--output-file-name", "clip.mp4", "--return-frames")
    ended = generate("--prompt", "a cat", *flags)
    assert ended.returncode == 0, ended.stderr
    assert frames_of(tmp_path / "clip.mp4") == [(48, 32)] * 9
    assert {p.suffix for p in tmp_path.iterdir()} == {".mp4", ".npy"}


@pytest.mark.parametrize("offloaded", [False, True])
def test_the_frames_are_those_of_diffusers(tiny_model: Path, tmp_path: Path, offloaded: bool) -> None:
    flags = small(tiny_model, tmp_path, "--num-frames", "9", "--return-frames", "--negative-prompt", "blurry")
    parts = ("dit", "text-encoder", "image-encoder", "vae") if offloaded else ()
    flags += [*(f"--{part}-cpu-offload" for part in parts), "--no-pin-cpu-memory", "--log-level", "info"]
    ended = generate("--prompt", "A cat &amp; a  dog", "--seed", "11", "--guidance-scale", "4", *flags)
    assert ended.returncode == 0, ended.stderr
    warning = "--image-encoder-cpu-offload does nothing: this model has no such component"
    for said in (warning, "offloaded, in pageable host memory: text_encoder"):
        assert ended.stderr.count(said) == offloaded
    assert "GB of weights on it" in ended.stderr
    frames = np.load(next(tmp_path.glob("*.npy")))
    torch.set_num_threads(1)
    reference = WanPipeline.from_pretrained(str(tiny_model), dtype=torch.float32)  # type: ignore[no-untyped-call]
    made = reference(
        "A cat &amp; a  dog",
        "blurry",
        height=48,
        width=32,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(11),
        output_type="np",
    ).frames[0]
    difference = np.abs(frames.astype(int) - np.round(made * 255).astype(int))
    assert frames.shape == (9, 48, 32, 3)
    assert difference.max() <= 1
    assert frames.std() > 10, "a picture that is not flat"


def test_a_prompt_file_gives_one_job_a_line_and_every_path(tiny_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n\na red bird\n")
    out = tmp_path / "out"
    flags = small(tiny_model, out, "--num-frames", "1", "--num-outputs-per-prompt", "2", "--json")
    ended = generate("--prompt-path", str(prompts), *flags)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(list(out.glob("*.png"))) == 6
    assert sorted(str(p) for p in out.glob("*.png")) == sorted(lines[-1]["paths"])


def test_the_same_seed_gives_the_same_picture_and_two_runs_at_once_do_not_meet(
    tiny_model: Path, tmp_path: Path
) -> None:
    runs = [
        subprocess.Popen(
            command("--prompt", "a cat", "--seed", "5", *small(tiny_model, tmp_path / str(n), "--num-frames", "1")),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for n in range(2)
    ]
    assert [run.wait(170) for run in runs] == [0, 0]
    first, second = (next((tmp_path / str(n)).glob("*.png")).read_bytes() for n in range(2))
    assert first == second


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_no_file_and_no_slot(
    tiny_model: Path, tmp_path: Path, private_tmp: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    flags = ["--model-path", str(tiny_model), "--output-path", str(out), "--height", "96", "--width", "96"]
    run = subprocess.Popen(
        command(
            "--prompt",
            "a cat",
            *flags,
            "--num-frames",
            "17",
            "--num-inference-steps",
            "1000",
            "--json",
            "--drain-grace-s",
            "0",
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(private_tmp)},
        start_new_session=True,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if '"denoising"' in line:
            break
    family = descendants(run.pid)
    assert len(family) >= 3
    slots = [Path("/dev/shm") / f"{folder.name}-slots" for folder in private_tmp.glob("safelight-*")]
    assert [folder.is_dir() for folder in slots] == [True]
    os.killpg(run.pid, number)  # as a terminal does: to the whole foreground group
    _out, err = run.communicate(timeout=30)
    assert run.returncode == 128 + number, err
    assert "Traceback" not in err
    assert "Fatal" not in err
    assert not wait_gone(family)
    assert not out.exists() or not list(out.iterdir())
    assert not list(private_tmp.glob("safelight-*"))
    assert not slots[0].exists()


def test_a_terminated_generate_finishes_what_runs_within_its_grace(tiny_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    flags = ["--model-path", str(tiny_model), "--output-path", str(tmp_path / "out"), "--height", "32", "--width", "32"]
    run = subprocess.Popen(
        command("--prompt-path", str(prompts), *flags, "--num-frames", "1", "--num-inference-steps", "400",
                "--max-queue", "1", "--drain-grace-s", "60", "--json"),
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert run.stdout is not None
    for line in run.stdout:
        if '"denoising"' in line:
            break
    run.terminate()
    run.communicate(timeout=90)
    assert run.returncode == 128 + signal.SIGTERM
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_a_killed_generate_takes_its_processes_along_and_the_next_run_sweeps(
    tiny_model: Path, tmp_path: Path, private_tmp: Path
) -> None:
    environment = os.environ | {"TMPDIR": str(private_tmp)}
    flags = ["--model-path", str(tiny_model), "--output-path", str(tmp_path), "--height", "96", "--width", "96"]
    run = subprocess.Popen(
        command("--prompt", "a cat", *flags, "--num-frames", "17", "--num-inference-steps", "1000", "--json"),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if '"denoising"' in line:
            break
    family = descendants(run.pid)
    run.kill()
    run.communicate()
    assert not wait_gone(family)
    assert len(list(private_tmp.glob("safelight-*"))) == 1
    again = command("--prompt", "a cat", *small(tiny_model, tmp_path, "--num-frames", "1"))
    assert subprocess.run(again, env=environment, capture_output=True, timeout=170).returncode == 0
    assert not list(private_tmp.glob("safelight-*"))
