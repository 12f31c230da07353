"""On CUDA devices: steps with recorded forwards give the bits of steps without, on one device and over several."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deeper import script
from device_waits import no_waits
from rank_processes import run_ranks

from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines import forward_graphs
from safelight.runtime.pipelines.forward_graphs import CudaRecorder, ForwardGraphs
from safelight.runtime.pipelines.protocol import DenoiseState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # "is a prototype feature"
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 5
CHECKPOINTS = {"wan": "wan2.1-t2v", "flux": "flux1-dev", "qwen": "qwen-image", "zimage": "z-image-turbo"}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def parity(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, cases = tmp_path_factory.mktemp(request.param), script("parity_table").family(request.param)
    script("make_checkpoint").make(CHECKPOINTS[request.param], folder)
    return cases, cases.Parity(folder)


def on_gpu(parity: Any, dtype: torch.dtype, **options: Any) -> Any:
    wanted = LoadOptions(torch.device("cuda"), dtype, torch.float32, None, ParallelMesh.single(), **options)
    pipeline = load_pipeline(parity.ours.spec.root, wanted)
    return parity.small(pipeline) if hasattr(parity, "small") else pipeline


def starts(pipeline: Any, cases: Any, parity: Any) -> list[DenoiseState]:
    """Two outputs of different prompts."""
    made = []
    for number, prompt in enumerate(("a red cat", "the blue dog and the green bird, at night")):
        request = parity.request(replace(cases.CASES[0], prompt=prompt, steps=STEPS, seed=number))
        made.append(pipeline.prepare(request, pipeline.encode(request), 0))
    return made


def run(pipeline: Any, states: list[DenoiseState]) -> list[torch.Tensor]:
    """The latents of all steps, one output after the other and then both in one batch."""
    found = []
    for batch in ([states[0]], [states[1]], states, [states[0]]):
        current = batch
        for _ in range(STEPS):
            current = pipeline.step(current)
            found += [state.latents.clone() for state in current]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_recorded_steps_equal_steps_as_they_are(parity: Any, dtype: torch.dtype) -> None:
    cases, both = parity
    pipeline = on_gpu(both, dtype)
    states = starts(pipeline, cases, both)
    made, expected = run(pipeline, states), run(replace(pipeline, graphs=ForwardGraphs()), states)
    assert pipeline.graphs.count >= 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(made, expected, strict=True))


def test_recording_and_launching_never_wait_for_the_device(parity: Any) -> None:
    cases, both = parity
    pipeline = on_gpu(both, torch.bfloat16)
    states = pipeline.step(starts(pipeline, cases, both))
    torch.cuda.synchronize()
    with no_waits():
        for _ in range(2):
            states = pipeline.step(states)
    assert pipeline.graphs.count
    assert all(torch.isfinite(state.latents).all() for state in states)


def test_what_is_recorded_keeps_right_while_memory_is_used_by_others(parity: Any) -> None:
    cases, both = parity
    pipeline = on_gpu(both, torch.bfloat16)
    state = starts(pipeline, cases, both)[0]
    expected = replace(pipeline, graphs=ForwardGraphs()).step([state])[0].latents
    for _ in range(3):
        pipeline.step([state])
        litter = [torch.full((1 << n,), torch.nan, device="cuda") for n in range(8, 22)]
        torch.cuda.empty_cache()
        del litter
        assert torch.equal(pipeline.step([state])[0].latents, expected)


@pytest.mark.parametrize("options", [{"cuda_graphs": False}, {"offload": ("dit",)}], ids=["switched off", "streamed"])
def test_nothing_is_recorded(parity: Any, options: dict[str, Any]) -> None:
    cases, both = parity
    pipeline = on_gpu(both, torch.bfloat16, **options)
    states = starts(pipeline, cases, both)
    for _ in range(3):
        states = pipeline.step(states)
    assert (pipeline.graphs.count, pipeline.graphs.room) == (0, 0)


def test_pools_that_make_way_give_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_graphs, "IDLE_FORWARDS", 2)
    graphs = ForwardGraphs(CudaRecorder(torch.device("cuda")), room=512 << 20)

    def forward(x: torch.Tensor) -> torch.Tensor:
        wide = x[:, None] * torch.arange(16, device=x.device)  # 16 times as large as its input
        return wide.sum(1)

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for number in range(12):  # pools of 64 to 240 MB, each used three times and never again
        x = torch.randn((1 << 20) + (number << 18), device="cuda")
        needs = partial(int, 68 * x.numel())
        for _ in range(4):
            torch.testing.assert_close(graphs(forward, x, needs=needs), forward(x))
        del x
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() - before < 640 << 20
    assert graphs.count
    graphs.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 32 << 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.timeout(200)
def test_recorded_steps_of_two_devices_equal_steps_as_they_are(tmp_path: Path) -> None:
    script("make_checkpoint").make("flux1-dev", tmp_path / "model")
    (tmp_path / "ranks").mkdir()
    program = Path(__file__).with_name("forward_graphs_gpu_ranks.py")
    run_ranks(program, 2, tmp_path / "ranks", tmp_path / "model", backend="nccl")
