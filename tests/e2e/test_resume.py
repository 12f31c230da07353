"""`generate --state-dir`, preempted or killed in the middle, then `--resume`: the same pictures, nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

LONG = 600  # steps: two seconds
PROMPTS = [
    {"prompt": "a cat", "num_inference_steps": 4},
    {"prompt": "a dog", "num_inference_steps": LONG},
    {"prompt": "a bird", "num_inference_steps": LONG, "seed": 8},
    {"prompt": "a cow", "num_inference_steps": 4},
]
Lines = list[dict[str, Any]]


class Runs:
    """Commands on one prompt file and one state folder."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.out, self.state = folder / "out", folder / "state"
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
        self.command = [
            sys.executable, "-m", "safelight", "generate", "--device", os.environ.get("E2E_DEVICE", "cpu"), "--json",
            "--model-path", str(model), "--prompt-path", str(folder / "prompts.jsonl"), "--height", "32",
            "--width", "32", "--num-frames", "1", "--return-frames", "--seed", "7", "--max-queue", "3",
            "--output-path", str(self.out),
        ]  # fmt: skip

    def whole(self, *flags: str) -> tuple[int, Lines]:
        ended = subprocess.run([*self.command, *flags], capture_output=True, text=True, timeout=120)
        assert "Traceback" not in ended.stderr, ended.stderr
        return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()]

    def disturbed(self, disturb: Callable[[int], None], *flags: str) -> tuple[int, Lines]:
        """Calls `disturb` with the process group when the first job is done and the second is at step 150."""
        command = [*self.command, "--state-dir", str(self.state), *flags]
        lines: Lines = []
        done = False
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
            assert run.stdout is not None
            for text in run.stdout:
                lines.append(json.loads(text))
                done = done or (lines[-1]["event"] == "completed" and lines[-1]["number"] == 1)
                if done and lines[-1].get("number") == 2 and lines[-1].get("step", 0) >= 150:
                    disturb(run.pid)
                    break
            lines += [json.loads(text) for text in run.stdout]
            return run.wait(60), lines

    def frames(self) -> dict[str, bytes]:
        return {path.name: np.load(path).tobytes() for path in self.out.glob("*.npy")}


@pytest.fixture(scope="module")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The frames of a run that nobody disturbs and that keeps nothing."""
    runs = Runs(tiny_model, tmp_path_factory.mktemp("undisturbed"))
    code, _ = runs.whole()
    assert code == 0
    assert len(set(runs.frames().values())) == len(PROMPTS)
    return runs.frames()


@pytest.fixture
def runs(tiny_model: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_model, tmp_path)


def first_steps(lines: Lines) -> dict[int, int]:
    """The first denoising step of each job that a run has told of."""
    found: dict[int, int] = {}
    for line in lines:
        if line["event"] == "progress" and line["stage"] == "denoising":
            found.setdefault(line["number"], line.get("step", 0))
    return found


def test_a_preempted_run_goes_on_where_it_stood(runs: Runs, expected: dict[str, bytes]) -> None:
    def preempt(group: int) -> None:  # as clusters do: to all processes, and more than once
        os.killpg(group, signal.SIGTERM)
        os.kill(group, signal.SIGTERM)
        os.kill(group, signal.SIGTERM)

    code, lines = runs.disturbed(preempt, "--drain-grace-s", "0.2")
    assert code == 75, lines[-3:]
    assert "--resume" in lines[-1]["text"]
    assert "a-dog-7.npy" not in runs.frames()
    code, lines = runs.whole("--state-dir", str(runs.state), "--resume")
    assert code == 0, lines[-1]
    assert runs.frames() == expected
    started = first_steps(lines)
    assert 1 not in started, "what was finished is not done again"
    assert started[2] >= 150, "saved at the end of the grace, without --checkpoint-every"
    assert sorted(lines[-1]["paths"]) == sorted(str(path) for path in runs.out.iterdir())
    assert len(lines[-1]["paths"]) == 2 * len(PROMPTS)
    assert not list((runs.state / "checkpoints").iterdir())


def test_a_killed_run_goes_on_from_its_last_checkpoint(runs: Runs, expected: dict[str, bytes]) -> None:
    code, _ = runs.disturbed(lambda group: os.killpg(group, signal.SIGKILL), "--checkpoint-every", "50")
    assert code == -signal.SIGKILL
    code, lines = runs.whole("--state-dir", str(runs.state))
    assert (code, lines[-1]["param"]) == (2, "state_dir"), "an unfinished run is not overwritten"
    code, lines = runs.whole("--state-dir", str(runs.state), "--resume")
    assert code == 0, lines[-1]
    assert runs.frames() == expected
    assert first_steps(lines)[2] >= 100, "a checkpoint may be on its way when the processes die"
    code, again = runs.whole("--state-dir", str(runs.state), "--resume")
    assert (code, sorted(again[-1]["paths"])) == (0, sorted(lines[-1]["paths"])), (
        "a finished run only says where its results are"
    )
    assert not first_steps(again)
