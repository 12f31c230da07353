"""On a CUDA device: the Qwen-Image transformer against itself in plain torch, and its pipelines against diffusers'."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device_waits import no_waits
from torch import Tensor

from safelight.kernels.dispatch import KernelSet, reference_kernels, select_kernels, triton_kernels
from safelight.runtime.models.qwen.pipeline import load
from safelight.runtime.models.qwen.transformer import QwenConfig, QwenInputs, QwenTransformer
from safelight.runtime.models.qwen.weights import parameter_dtype
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.parallel.mesh import ParallelMesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32"),  # on compiling for float32
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # torch's own, on compiling
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),  # torch says so at its first use
]
SCRIPTS = Path(__file__).parents[2] / "scripts"
Sample = tuple[Tensor, Tensor, QwenInputs]


def script(name: str) -> Any:
    """A module of scripts/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def build(dtype: torch.dtype, kernels: KernelSet) -> QwenTransformer:
    """A small network with the published head dim and seeded weights, which modulates pictures to edit apart."""
    config = QwenConfig(4, 128, 3, 64, zero_cond_t=True)
    with torch.device("cuda"):
        model = QwenTransformer(config, ParallelMesh.single(), kernels)
    generator = torch.Generator("cuda").manual_seed(5)
    for name, parameter in model.named_parameters():
        fresh = torch.randn(parameter.shape, generator=generator, device="cuda")
        fresh = 1 + 0.1 * fresh if "norm" in name else fresh * parameter.shape[-1] ** -0.5
        parameter.data = fresh.to(parameter_dtype(name, dtype))
    return model.to("cuda")


def inputs(text: int = 37, batch: int = 2, pictures: int = 1) -> Sample:
    references = tuple(noise(batch, 16, 1, 14, 10) for _ in range(pictures))
    return noise(batch, 16, 1, 18, 22), torch.rand(batch, device="cuda") * 1000, QwenInputs(noise(batch, text, 64), references)  # fmt: skip  # noqa: E501


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("pictures", [0, 2])
def test_fused_forward_in_float32_equals_plain_torch(pictures: int) -> None:
    sample = inputs(pictures=pictures)
    plain = build(torch.float32, reference_kernels())(*sample)
    torch.testing.assert_close(build(torch.float32, triton_kernels())(*sample), plain, rtol=0, atol=1e-4)


def test_fused_forward_in_bfloat16_is_as_near_to_float32_as_plain_torch() -> None:
    sample = inputs()
    exact = build(torch.float32, reference_kernels())(*sample)
    plain = (build(torch.bfloat16, reference_kernels())(*sample) - exact).norm() / exact.norm()
    fused = (build(torch.bfloat16, triton_kernels())(*sample) - exact).norm() / exact.norm()
    assert fused <= 1.2 * plain
    assert fused < 0.03


def test_a_forward_never_waits_for_the_device() -> None:
    model, sample = build(torch.bfloat16, select_kernels(torch.device("cuda"))), inputs()
    model(*sample)  # kernels are compiled and loaded once
    with no_waits():
        model(*sample)


def test_a_forward_can_be_captured_and_replayed_on_other_values() -> None:
    model, static, out = build(torch.bfloat16, triton_kernels()), inputs(), noise(2, 16, 1, 18, 22)
    rotary = model.rope(((9, 11), (7, 5)), 37)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(*static, out=out, rotary=rotary)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(*static, out=out, rotary=rotary)
    fresh = inputs()
    static[0].copy_(fresh[0])
    static[1].copy_(fresh[1])
    static[2].embeds.copy_(fresh[2].embeds)
    static[2].references[0].copy_(fresh[2].references[0])
    graph.replay()
    assert torch.equal(out, model(*fresh))


def test_compiled_blocks_equal_eager_ones_for_texts_of_any_length_without_a_graph_for_each() -> None:
    for kernels in (reference_kernels(), triton_kernels()):
        eager, model = build(torch.float32, kernels), build(torch.float32, kernels)
        model.compile_blocks()
        torch._dynamo.reset()
        for text in (37, 40, 21, 64, 5, 33, 48, 9, 80, 50):  # lengths that 16 divides may have a graph of their own
            sample = inputs(text=text)
            torch.testing.assert_close(model(*sample), eager(*sample), rtol=0, atol=1e-4)
            if text == 5:
                made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, family = tmp_path_factory.mktemp("qwen"), script("parity_table").family("qwen_edit")
    script("make_checkpoint").make(family.CHECKPOINT, folder)
    return family.Parity(folder)


def on_gpu(parity: Any, dtype: torch.dtype) -> Any:
    options = LoadOptions(torch.device("cuda"), dtype, torch.float32, None, ParallelMesh.single())
    return parity.small(load(parity.ours.spec, options))


def case(**changes: Any) -> Any:
    family = sys.modules["parity.qwen_edit"]
    return family.Case("", pictures=2, **changes)


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_steps_never_wait_for_the_device(parity: Any, scale: float) -> None:
    pipeline = on_gpu(parity, torch.bfloat16)
    requests = [parity.request(case(scale=scale, prompt=prompt)) for prompt in ("a cat", "the dog is blue")]
    states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in requests]
    states = pipeline.step(states)  # the first use of a kernel may load it
    with no_waits():
        for _ in range(2):
            states = pipeline.step(states)
    assert all(torch.isfinite(state.latents).all() for state in states)


def test_float32_pictures_equal_those_of_the_cpu(parity: Any) -> None:
    latents, frames = parity.run_ours(case(), on_gpu(parity, torch.float32))
    on_cpu = parity.run_ours(case())
    assert (latents.cpu() - on_cpu[0]).abs().max() <= 1e-3
    assert (frames.cpu().int() - on_cpu[1].int()).abs().max() <= 2


def test_bfloat16_is_as_near_to_float32_as_the_reference(parity: Any) -> None:
    """The last test, because it rounds the reference's weights."""
    exact, _ = parity.run_reference(case())
    ours = parity.run_ours(case(), on_gpu(parity, torch.bfloat16))[0].cpu()
    parity.theirs.to("cuda", torch.bfloat16)
    theirs = parity.run_reference(case())[0].float().cpu()

    def error(latents: Tensor) -> float:
        return float((latents - exact).norm() / exact.norm())

    assert 0 < error(ours) <= 2 * error(theirs)
