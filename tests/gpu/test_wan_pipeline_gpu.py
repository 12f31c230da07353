"""On a CUDA device: steps never wait for it, and bfloat16 is as near to float32 as diffusers' is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.configs.families import identify
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.wan.pipeline import WanPipeline, load
from safelight.runtime.parallel.mesh import ParallelMesh

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


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_steps_never_wait_for_the_device(parity: Any, guidance: float) -> None:
    pipeline = on_gpu(parity, torch.bfloat16)
    cases = [replace(parity_case(), sampler=name, guidance=guidance) for name in ("unipc", "euler")]
    with torch.inference_mode():
        requests = [parity.request(case) for case in cases]
        states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in requests]
        states = pipeline.step(states)  # the first use of a kernel may load it
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(STEPS - 1):
            states = pipeline.step(states)
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(state.latents).all() for state in states)


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
