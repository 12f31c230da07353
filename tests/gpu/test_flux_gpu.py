"""On a CUDA device: the fused norm of heads, the FLUX transformer against itself in plain torch, the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_waits import no_waits
from rank_processes import module
from torch import Tensor

from safelight.configs.families import identify
from safelight.kernels.dispatch import KernelSet, reference_kernels, select_kernels, triton_kernels
from safelight.runtime.models.flux.pipeline import FluxPipeline, load
from safelight.runtime.models.flux.transformer import FluxConfig, FluxText, FluxTransformer
from safelight.runtime.models.flux.weights import parameter_dtype
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
ULPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}
TEXT = 40


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "dim"), [(1, 1, 3, 16), (2, 7, 4, 12), (1, 333, 24, 128), (3, 65, 5, 64), (1, 0, 2, 8)]
)
def test_fused_norm_of_heads_equals_its_definition(
    batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    width = heads * dim
    x = noise(batch, tokens, 3 * width, dtype=dtype).chunk(3, dim=-1)[1]  # rows as after a fused projection
    weight, angles = noise(dim, dtype=dtype), noise(tokens, dim // 2) * 10
    fused, plain = (
        k.rms_norm_rope_heads(x, weight, angles.cos(), angles.sin(), 1e-6, None)
        for k in (triton_kernels(), reference_kernels())
    )
    assert fused.dtype == dtype
    assert fused.is_contiguous()
    torch.testing.assert_close(fused, plain, rtol=ULPS[dtype], atol=2e-5)


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("shape", [(1, 333, 3072, 12288), (2, 7, 48, 100), (1, 0, 16, 64)])
def test_fused_gelu_equals_its_definition(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, tokens, width, inner = shape
    both = noise(batch, tokens, width + inner, dtype=dtype) * 3
    x, hidden = both[..., :width], both[..., width:]
    fused, plain = (k.gelu_beside(x, hidden) for k in (triton_kernels(), reference_kernels()))
    torch.testing.assert_close(fused, plain, rtol=ULPS[dtype], atol=2e-5)


def build(dtype: torch.dtype, kernels: KernelSet) -> FluxTransformer:
    """A small network with the published head dim and seeded weights."""
    config = FluxConfig(4, 128, 64, 2, 2, 96, 80, guidance_embeds=True)
    with torch.device("cuda"):
        model = FluxTransformer(config, ParallelMesh.single(), kernels)
    generator = torch.Generator("cuda").manual_seed(5)
    for name, parameter in model.named_parameters():
        fresh = torch.randn(parameter.shape, generator=generator, device="cuda")
        fresh = 1 + 0.1 * fresh if "norm" in name else fresh * parameter.shape[-1] ** -0.5
        parameter.data = fresh.to(parameter_dtype(name, dtype))
    return model.to("cuda")


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, FluxText]:
    text = FluxText(noise(batch, TEXT, 96), noise(batch, 80), torch.rand(batch, device="cuda") * 4)
    return noise(batch, 16, 1, 18, 22), torch.rand(batch, device="cuda") * 1000, text


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_fused_forward_in_float32_equals_plain_torch() -> None:
    sample = inputs()
    plain = build(torch.float32, reference_kernels())(*sample)
    torch.testing.assert_close(build(torch.float32, triton_kernels())(*sample), plain, rtol=0, atol=1e-4)


def test_fused_forward_in_bfloat16_is_as_near_to_float32_as_plain_torch() -> None:
    sample = inputs()
    exact = build(torch.float32, reference_kernels())(*sample)
    plain = (build(torch.bfloat16, reference_kernels())(*sample) - exact).norm() / exact.norm()
    fused = (build(torch.bfloat16, triton_kernels())(*sample) - exact).norm() / exact.norm()
    assert fused <= 1.2 * plain
    assert fused < 0.05


def test_a_forward_never_waits_for_the_device() -> None:
    model, sample = build(torch.bfloat16, select_kernels(torch.device("cuda"))), inputs()
    model(*sample)  # kernels are compiled and loaded once
    with no_waits():
        model(*sample)


def test_a_forward_can_be_captured_and_replayed_on_other_values() -> None:
    model, static, out = build(torch.bfloat16, triton_kernels()), inputs(), torch.empty(2, 16, 1, 18, 22, device="cuda")
    rotary = model.rope(out.shape, TEXT)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(*static, out=out, rotary=rotary)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(*static, out=out, rotary=rotary)
    fresh = inputs()
    for ours, theirs in zip((*static[:2], *static[2]), (*fresh[:2], *fresh[2]), strict=True):
        if ours is not None and theirs is not None:  # modulation made ahead is not part of this forward
            ours.copy_(theirs)
    graph.replay()
    assert torch.equal(out, model(*fresh))


def test_compiled_blocks_equal_eager_ones() -> None:
    sample = inputs()
    eager = build(torch.float32, reference_kernels())(*sample)
    for kernels in (reference_kernels(), triton_kernels()):
        model = build(torch.float32, kernels)
        model.compile_blocks()
        torch.testing.assert_close(model(*sample), eager, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("flux")
    module(SCRIPTS / "make_checkpoint.py").make("flux1-dev", folder)
    return cases().Parity(folder)


def cases() -> Any:
    return module(SCRIPTS / "parity_table.py").family("flux")


def on_gpu(parity: Any, dtype: torch.dtype) -> FluxPipeline:
    spec = identify(parity.ours.spec.root)
    return load(spec, LoadOptions(torch.device("cuda"), dtype, torch.float32, None, ParallelMesh.single()))


@pytest.mark.parametrize("true_cfg", [1.0, 2.0])
def test_steps_never_wait_for_the_device(parity: Any, true_cfg: float) -> None:
    pipeline = on_gpu(parity, torch.bfloat16)
    requests = [parity.request(replace(cases().CASES[0], guidance=g, true_cfg=true_cfg)) for g in (3.5, 1.0)]
    states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in requests]
    states = pipeline.step(states)  # the first use of a kernel may load it
    torch.cuda.synchronize()
    with no_waits():
        states = pipeline.step(states)
    assert all(torch.isfinite(state.latents).all() for state in states)


def test_bfloat16_is_as_near_to_float32_as_the_reference(parity: Any) -> None:
    case = replace(cases().CASES[0], steps=4)
    exact, _ = parity.run_reference(case)
    ours = parity.run_ours(case, on_gpu(parity, torch.bfloat16))[0].cpu()
    parity.theirs.to("cuda", torch.bfloat16)
    parity.theirs.vae.to(torch.float32)
    theirs = parity.run_latents(case).float().cpu()
    parity.theirs.to("cpu", torch.float32)

    def error(latents: Tensor) -> float:
        return float((latents - exact).norm() / exact.norm())

    assert 0 < error(ours) <= 2 * error(theirs)


def test_float32_pictures_equal_those_of_the_cpu(parity: Any) -> None:
    case = cases().CASES[0]
    latents, frames = parity.run_ours(case, on_gpu(parity, torch.float32))
    on_cpu = parity.run_ours(case)
    assert (latents.cpu() - on_cpu[0]).abs().max() <= 5e-3  # of about 30
    assert (frames.cpu().int() - on_cpu[1].int()).abs().max() <= 2
