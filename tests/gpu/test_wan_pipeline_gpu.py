"""On a CUDA device: steps never wait for it, and bfloat16 is as near to float32 as diffusers' is."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_waits import no_waits

from safelight.configs.families import identify
from safelight.runtime.messages import Denoise, Encode, Endpoints, Op, Plan, Prepare, Preview, UnitRef, WorkerSpec
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.wan.pipeline import WanPipeline, load
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.worker.checkpoint import CheckpointWriter
from safelight.runtime.worker.executor import Executor, Launched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # "is a prototype feature"
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),  # torch says so at its first use
]
SCRIPTS = Path(__file__).parents[2] / "scripts"
STEPS = 4


def script(name: str) -> Any:
    """A module of scripts/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("wan")
    script("make_checkpoint").make("wan2.1-t2v", folder)
    return script("parity_table").family("wan").Parity(folder)


def parity_case() -> Any:
    return sys.modules["parity.wan"].CASES[0]


def on_gpu(parity: Any, dtype: torch.dtype) -> WanPipeline:
    spec = identify(parity.ours.spec.root)
    return load(spec, LoadOptions(torch.device("cuda"), dtype, torch.float32, None, ParallelMesh.single()))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_steps_never_wait_for_the_device(parity: Any, guidance: float) -> None:
    pipeline = on_gpu(parity, torch.bfloat16)
    cases = [replace(parity_case(), sampler=name, guidance=guidance) for name in ("unipc", "euler")]
    with torch.inference_mode():
        requests = [parity.request(case) for case in cases]
        states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in requests]
        states = pipeline.step(states)  # the first use of a kernel may load it
        with no_waits():
            for _ in range(STEPS - 1):
                states = pipeline.step(states)
    assert all(torch.isfinite(state.latents).all() for state in states)


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_previews_never_wait_for_the_device_and_are_whole_when_their_copy_has_passed(
    parity: Any, sampler: str, tmp_path: Path
) -> None:
    pipeline, request = on_gpu(parity, torch.bfloat16), parity.request(replace(parity_case(), sampler=sampler))
    assert pipeline.colours is not None
    spec = WorkerSpec(
        endpoints=Endpoints(*["ipc:///unused"] * 6), group=0, rank=0, world_size=1, group_epoch=0, local_rank=0,
        store="", model_path="", vae_path=None, device="cuda", dit_precision="bf16", vae_precision="fp32",
        checkpoint_dir="", slots=None, num_threads=1, ranks_on_host=1, log_level="info",
    )  # fmt: skip
    executor = Executor(pipeline, spec, CheckpointWriter(None), lambda message: None)

    def run(number: int, *ops: Op) -> Launched:
        launched = executor.execute(Plan(0, 0, 0, number, ops))
        assert [op.error for op in launched.ops] == [None] * len(ops)
        return launched

    def step(number: int) -> tuple[Op, Op]:
        return Denoise((UnitRef("a", 0, 0, number),)), Preview("a", 0, 0, number, number + 1)

    with torch.inference_mode():
        run(0, Encode("a", 0, request), Prepare("a", 0, 0), *step(0))  # the first use of a kernel may load it
        torch.cuda.synchronize()
        with no_waits():
            launched = run(1, *step(1))
        preview = launched.ops[-1].preview
        assert preview is not None
        assert preview.copied is not None
        preview.copied.synchronize()
        expected = pipeline.preview(executor._jobs["a", 0].states[0])
        assert expected is not None
        assert torch.equal(preview.pixels, expected.cpu())
        assert preview.pixels.float().std() > 1


def test_bfloat16_is_as_near_to_float32_as_the_reference(parity: Any) -> None:
    case = parity_case()
    exact, _ = parity.run_reference(case)
    ours = parity.run_ours(case, on_gpu(parity, torch.bfloat16))[0].cpu()
    parity.theirs.to("cuda", torch.bfloat16)
    parity.theirs.vae.to(torch.float32)
    theirs = parity.run_reference(case)[0].float().cpu()

    def error(latents: torch.Tensor) -> float:
        return float((latents - exact).norm() / exact.norm())

    assert 0 < error(ours) <= 2 * error(theirs)


def test_float32_frames_equal_those_of_the_cpu(parity: Any) -> None:
    case = parity_case()
    latents, frames = parity.run_ours(case, on_gpu(parity, torch.float32))
    on_cpu = parity.run_ours(case)
    assert (latents.cpu() - on_cpu[0]).abs().max() <= 1e-3
    assert (frames.cpu().int() - on_cpu[1].int()).abs().max() <= 2
