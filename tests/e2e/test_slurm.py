"""The shipped batch scripts in a real Slurm: an array, and jobs that are told to stop, preempted and requeued."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slurm_cluster
from slurm_cluster import CannotStart, SlurmCluster, running_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
LONG = {"prompt": "a dog", "num_inference_steps": 1000, "seed": 8}  # some seconds
PROMPTS = [
    LONG,
    {"prompt": "a cat", "num_inference_steps": 4, "seed": 8},
    {"prompt": "a cow", "num_inference_steps": 4},
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not pytest's: munged wants everyone to reach its socket
    try:
        with running_cluster(folder, nodes=2) as started:
            yield started
    except CannotStart as reason:
        pytest.skip(f"Slurm's daemons do not start here: {reason}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Submitter:
    """A user's folder from which the scripts are submitted."""

    def __init__(self, cluster: SlurmCluster, folder: Path, model: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
        self.flags = [
            "--device", "cpu", "--json", "--model-path", str(model), "--height", "64", "--width", "64",
            "--num-frames", "1", "--return-frames", "--seed", "7",
        ]  # fmt: skip
        (folder / "bin").mkdir()
        for name, module in (("safelight", "safelight"), ("torchrun", "torch.distributed.run")):
            command = folder / "bin" / name
            command.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
            command.chmod(0o755)

    def submit(self, *arguments: str, **variables: str) -> str:
        """The number of the new job."""
        environment = self.cluster.environment | variables
        environment |= {"PATH": f"{self.folder}/bin:{environment['PATH']}", "PYTHONPATH": str(ROOT / "src")}
        command = ["sbatch", "--parsable", *arguments]
        sent = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=30)
        assert sent.returncode == 0, sent.stderr
        return sent.stdout.strip()

    def script(self, name: str, *flags: str, options: tuple[str, ...] = (), **variables: str) -> str:
        path = str(ROOT / "scripts" / "slurm" / f"{name}.sbatch")
        return self.submit(*options, path, *self.flags, *flags, **variables)

    def lines(self, job: str) -> list[dict[str, Any]]:
        """What `generate --json` said in the job's log, of all its starts."""
        log = self.folder / f"safelight-{job}.log"
        text = log.read_text() if log.exists() else ""
        whole = text.splitlines()[: text.count("\n")]
        return [json.loads(line) for line in whole if line.startswith("{")]

    def at_step(self, job: str, step: int) -> None:
        """Waits until the job, in its latest start, has done so many steps."""

        def reached(_: str) -> bool:
            last = [line.get("step", 0) for line in self.lines(job) if line.get("stage") == "denoising"]
            return bool(last) and last[-1] >= step

        self.cluster.wait(job, reached)

    def frames(self, folder: str) -> dict[str, bytes]:
        return {path.name: np.load(path).tobytes() for path in (self.folder / folder).glob("*.npy")}


@pytest.fixture(scope="module")
def user(cluster: SlurmCluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Submitter:
    return Submitter(cluster, tmp_path_factory.mktemp("user"), tiny_model)


@pytest.fixture(scope="module")
def array(user: Submitter) -> dict[str, bytes]:
    """The frames of the prompt file, shared out among three tasks, the last of which has none."""
    job = user.script("array", "--prompt-path", "prompts.jsonl", "--output-path", "array", options=("--array=0-3",))
    assert user.cluster.wait(job, lambda state: not {"PENDING", "RUNNING", "COMPLETING"} & {*state.split()}, 90) == (
        "COMPLETED"
    )
    return user.frames("array")


def test_the_tasks_of_an_array_make_all_lines_of_the_prompt_file(user: Submitter, array: dict[str, bytes]) -> None:
    assert sorted(array) == ["a-cat-8.npy", "a-cow-7.npy", "a-dog-8.npy"]
    assert not list((user.folder / "safelight-state").iterdir()), "a finished task needs its state no more"


def test_a_job_told_to_stop_and_then_preempted_makes_the_same_picture(user: Submitter, array: dict[str, bytes]) -> None:
    steps = str(LONG["num_inference_steps"])
    job = user.script(
        "generate", "--prompt", "a dog", "--num-inference-steps", steps, "--seed", "8", "--drain-grace-s", "0",
        "--output-path", "stopped",
    )  # fmt: skip
    user.at_step(job, 150)
    user.cluster.ask(
        "scancel", "--batch", "--signal=TERM", job
    )  # what --signal=B:TERM@60 sends before the time is over
    user.cluster.wait(job, lambda state: state == "PENDING")
    assert list((user.folder / "safelight-state" / job / "checkpoints").iterdir())
    user.cluster.wait(job, lambda state: state == "RUNNING")
    user.at_step(job, 450)
    more_important = user.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    user.cluster.wait(job, lambda state: state == "PENDING")
    user.cluster.wait(more_important, lambda state: state == "COMPLETED")
    assert user.cluster.wait(job, lambda state: state not in ("PENDING", "RUNNING", "COMPLETING"), 90) == "COMPLETED"
    assert user.frames("stopped") == {"a-dog-8.npy": array["a-dog-8.npy"]}
    assert "Restarts=2" in user.cluster.ask("scontrol", "show", "job", job)
    done = [line.get("step", 0) for line in user.lines(job) if line.get("stage") == "denoising"]
    back = [after for before, after in itertools.pairwise(done) if after <= before]
    assert not back, f"steps were done twice, from {back} on"


def test_a_cancelled_job_stays_cancelled_and_another_goes_on_with_it(user: Submitter, array: dict[str, bytes]) -> None:
    flags = (
        "--prompt", "a dog", "--num-inference-steps", str(LONG["num_inference_steps"]), "--seed", "8",
        "--drain-grace-s", "0", "--output-path", "cancelled",
    )  # fmt: skip
    state = str(user.folder / "kept")
    job = user.script("generate", *flags, SAFELIGHT_STATE_DIR=state)
    user.at_step(job, 150)
    user.cluster.ask("scancel", job)
    assert user.cluster.wait(job, lambda state: state not in ("RUNNING", "COMPLETING")) == "CANCELLED"
    again = user.script("generate", *flags, SAFELIGHT_STATE_DIR=state)
    assert user.cluster.wait(again, lambda state: state not in ("PENDING", "RUNNING", "COMPLETING")) == "COMPLETED"
    steps = [line.get("step", 0) for line in user.lines(again) if line.get("stage") == "denoising"]
    assert steps[0] >= 150
    assert user.frames("cancelled") == {"a-dog-8.npy": array["a-dog-8.npy"]}


@pytest.mark.skipif(
    importlib.util.find_spec("safelight.entrypoints.worker") is None, reason="no ranks on several nodes in this version"
)
def test_two_nodes_make_one_picture(user: Submitter, array: dict[str, bytes]) -> None:
    flags = ("--prompt", "a cat", "--num-inference-steps", "4", "--seed", "8", "--output-path", "nodes")
    job = user.script("generate", *flags, options=("--nodes=2",), GPUS_PER_NODE="1")
    assert user.cluster.wait(job, lambda state: state not in ("PENDING", "RUNNING", "COMPLETING"), 120) == "COMPLETED"
    made = np.frombuffer(user.frames("nodes")["a-cat-8.npy"], np.uint8).astype(int)
    alone = np.frombuffer(array["a-cat-8.npy"], np.uint8).astype(int)
    assert np.abs(made[-made.size :] - alone[-made.size :]).max() <= 1
