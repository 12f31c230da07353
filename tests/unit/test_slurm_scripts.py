"""The batch scripts under bash; stubs of `safelight` and of the commands of Slurm note how they were called."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "slurm"
NAMES = ("generate", "serve", "array")
PROGRAM = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>calls
[[ $1 != keys ]] || exit 0
[[ $STUB_EXIT == term ]] || exit "$STUB_EXIT"
trap 'echo terminated >>calls; exit 75' TERM
touch ready
while :; do sleep 0.02; done
"""
NOTES = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>calls\n'
SCONTROL = (
    NOTES
    + """
[[ $2 != hostnames ]] || printf 'n0\\nn1\\n'
[[ $2 != node ]] || echo "NodeName=$3 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=other"
"""
)
SCANCEL = NOTES + 'kill -TERM "$(cat torchrun.pid)"\n'
SRUN = NOTES + 'shift\necho $$ >torchrun.pid\nexec "$@"\n'


class Job:
    """One batch script in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stubs = {
            "safelight": PROGRAM, "torchrun": PROGRAM, "scontrol": SCONTROL, "scancel": SCANCEL, "srun": SRUN,
            "squeue": NOTES + 'echo "$STUB_STATE"\n',
        }  # fmt: skip
        (folder / "bin").mkdir()
        for name, text in stubs.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environment = {
            "PATH": f"{folder}/bin:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "42",
            "SLURM_NNODES": "1", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4",
            "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_JOB_NODELIST": "n[0-1]",
            "STUB_EXIT": "0", "STUB_STATE": "RUNNING",
        }  # fmt: skip

    def start(self, name: str, *flags: str, **changes: str) -> subprocess.Popen[str]:
        script = str(SCRIPTS / f"{name}.sbatch")
        environment = {k: v for k, v in (self.environment | changes).items() if v}
        return subprocess.Popen(
            ["bash", script, *flags], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self, name: str, *flags: str, **changes: str) -> int:
        with self.start(name, *flags, **changes) as run:
            run.communicate(timeout=20)
            return run.returncode

    def terminated(self, name: str, *, times: int = 0, **changes: str) -> int:
        """Runs until the program works, and sends SIGTERM to the script alone, as --signal=B:TERM does.

        Or so many times to all its processes, as the end of a job does.
        """
        with self.start(name, STUB_EXIT="term", **changes) as run:
            deadline = time.monotonic() + 20
            while not (self.folder / "ready").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            for _ in range(times):
                os.killpg(run.pid, signal.SIGTERM)
            if not times:
                run.send_signal(signal.SIGTERM)
            run.communicate(timeout=20)
            return run.returncode

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_the_users_flags_come_last_so_that_they_win(job: Job) -> None:
    assert job.run("generate", "--prompt", "a b", SLURM_GPUS_ON_NODE="8") == 0
    assert job.calls == [
        f"safelight generate --state-dir {job.folder}/safelight-state/42 --resume --checkpoint-every 10 "
        "--drain-grace-s 10 --num-gpus 8 --prompt a b"
    ]


def test_an_array_task_takes_its_slice(job: Job) -> None:
    assert job.run("array", "--prompt-path", "p.txt") == 0
    assert f"--state-dir {job.folder}/safelight-state/40_2 " in job.calls[0]
    assert job.calls[0].endswith("--prompt-slice 2/4 --prompt-path p.txt")


def test_some_tasks_of_an_array_would_be_other_slices(job: Job) -> None:
    assert job.run("array", SLURM_ARRAY_TASK_COUNT="2") == 2
    assert job.run("array", SLURM_ARRAY_TASK_MIN="1") == 2
    assert not (job.folder / "calls").exists()
    assert job.run("array", SLURM_ARRAY_TASK_COUNT="2", SLICES="16", SAFELIGHT_STATE_DIR="/s") == 0
    assert "--state-dir /s/2 " in job.calls[0]
    assert "--prompt-slice 2/16" in job.calls[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_terminated_job_passes_the_signal_on_and_goes_back_to_the_queue(job: Job, name: str) -> None:
    assert job.terminated(name) == 75
    assert job.calls[1:] == ["terminated", "squeue --noheader --job 42 --format %T", "scontrol requeue 42"]


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_signals_to_all_processes_lose_nothing(job: Job, nodes: str) -> None:
    for times in (1, 2, 3, 2, 3):
        (job.folder / "ready").unlink(missing_ok=True)
        assert job.terminated("generate", times=times, SLURM_NNODES=nodes) == 75
        assert job.calls[-1] == "scontrol requeue 42"


@pytest.mark.parametrize("name", NAMES)
def test_a_cancelled_job_is_not_revived(job: Job, name: str) -> None:
    assert job.terminated(name, STUB_STATE="COMPLETING") == 75
    assert not [call for call in job.calls if call.startswith("scontrol requeue")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("code", ["1", "2"])
def test_a_failure_is_the_jobs_exit_code_and_is_not_tried_again(job: Job, name: str, code: str) -> None:
    assert job.run(name, STUB_EXIT=code) == int(code)
    assert len(job.calls) == 1


@pytest.mark.parametrize("name", ["generate", "array"])
def test_what_a_stopped_run_needs_is_kept_until_the_run_is_done(job: Job, name: str) -> None:
    state = job.folder / "safelight-state" / ("42" if name == "generate" else "40_2")
    own = job.folder / "own" / ("" if name == "generate" else "2")
    for folder in (state, own):
        folder.mkdir(parents=True)
    assert job.run(name, STUB_EXIT="75") == 75
    assert state.exists()
    assert job.run(name, SAFELIGHT_STATE_DIR=str(job.folder / "own")) == 0
    assert own.exists(), "a folder that the user named is the user's"
    assert job.run(name) == 0
    assert not state.exists()


def test_several_nodes_run_torchrun_on_each(job: Job) -> None:
    assert job.run("generate", "--prompt", "x", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="8") == 0
    command = next(call for call in job.calls if call.startswith("torchrun"))
    assert command.startswith(
        "torchrun --local-addr 10.0.0.7 --nnodes 2 --nproc-per-node 8 --max-restarts 0 --rdzv-id 42 --rdzv-backend c10d"
    )
    assert " --rdzv-endpoint 10.0.0.7:20042 -m safelight.entrypoints.worker generate --state-dir " in command
    state = f"{job.folder}/safelight-state/42"
    assert command.endswith(f"--num-gpus 16 --prompt x --keys {state}/keys")
    assert f"safelight keys {state}/keys" in job.calls
    assert job.run("generate", "--prompt", "x", "--keys", "k", SLURM_NNODES="2") == 0
    assert job.calls[-1].endswith("--num-gpus 2 --prompt x --keys k")


def test_on_several_nodes_slurm_signals_the_steps(job: Job) -> None:
    assert job.terminated("generate", SLURM_NNODES="2", GPUS_PER_NODE="1") == 75
    assert "scancel --signal=TERM 42" in job.calls
    assert job.calls[-1] == "scontrol requeue 42"


def test_without_safelight_on_the_path_the_checkout_is_used(job: Job) -> None:
    (job.folder / ".venv").mkdir()
    (job.folder / "bin" / "safelight").rename(job.folder / "held")
    (job.folder / "scripts").mkdir()
    install = "#!/usr/bin/env bash\nmkdir .venv/bin\ncp held .venv/bin/safelight\n"
    (job.folder / "scripts" / "run").write_text(install)
    (job.folder / "scripts" / "run").chmod(0o755)
    assert job.run("generate", "--prompt", "x") == 0
    assert job.calls[0].startswith("safelight generate")


def test_the_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [str(SCRIPTS / f"{name}.sbatch") for name in NAMES]
    checked = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, env=os.environ)
    assert checked.returncode == 0, checked.stdout
