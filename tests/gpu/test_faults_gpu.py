"""On two CUDA devices: a rank killed under NCCL is replaced, and the video is the undisturbed one."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from running_server import Running, request

from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.client import Client
from safelight.runtime.launch.supervisor import Supervisor
from safelight.runtime.messages import Event, Status

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_checkpoint.py"
STEPS = 400


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    subprocess.run([sys.executable, str(SCRIPT), "wan2.1-t2v", str(target), "--device", "cpu"], check=True)
    return target


def frames(running: Running, job: str) -> npt.NDArray[np.uint8]:
    event = running.terminals([job], timeout_s=120)[job]
    assert event.status is Status.COMPLETED, event
    made: npt.NDArray[np.uint8] = np.load(Path(event.artifacts[0].path))
    return made


@pytest.mark.parametrize("degrees", [{}, {"ulysses_degree": 2}, {"ring_degree": 2}], ids=["cfg", "ulysses", "ring"])
def test_a_rank_killed_under_nccl_is_replaced_and_changes_nothing(
    tiny_model: Path, degrees: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ServerArgs(model_path=str(tiny_model), device="cuda", num_gpus=2, checkpoint_every=20, **degrees)
    begun = time.monotonic()
    with Supervisor(settings, tiny_model, 1 << 20) as server, Client(server.endpoints) as client:
        server.wait_ready(200)
        ready_s = time.monotonic() - begun
        running = Running(server, client)
        expected = frames(running, client.submit(request(num_inference_steps=STEPS)))
        job = client.submit(request(num_inference_steps=STEPS))
        running.at_step(job, 100)
        killed, old = time.monotonic(), running.kill("worker 0.1")
        while server.pids().get("worker 0.1", old) == old:  # what the old ranks did is read meanwhile
            assert time.monotonic() < killed + 60, "no new rank"
            for event in client.poll(0.05):
                assert isinstance(event, Event)
                running.seen.setdefault(event.job, []).append(event)
        assert running.until(lambda event: event.job == job, timeout_s=120).status is None
        again_s = time.monotonic() - killed
        assert np.array_equal(frames(running, job), expected)
    with capsys.disabled():
        print(f"\n{settings.num_gpus} ranks {degrees or 'cfg 2'}: ready {ready_s:.1f} s, again {again_s:.1f} s")
