"""On a CUDA device: the ops that Z-Image adds, and its transformer against itself in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from device_waits import no_waits
from torch import Tensor

from safelight.kernels.dispatch import KernelSet, reference_kernels, select_kernels, triton_kernels
from safelight.runtime.models.zimage.transformer import ZImageConfig, ZImageText, ZImageTransformer
from safelight.runtime.models.zimage.weights import parameter_dtype
from safelight.runtime.parallel.mesh import ParallelMesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32"),  # on compiling for float32
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # torch's own, on compiling
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),  # torch says so at its first use
]

Call = Callable[[KernelSet], Tensor]
ULPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}
SHAPES = [(1, 1, 48), (2, 7, 96), (1, 333, 3840), (2, 65, 36)]  # (B, S, E)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def calls(shape: tuple[int, int, int], dtype: torch.dtype, per_token: bool) -> dict[str, Call]:
    """Every op on fresh inputs; x is a slice of a wider row, as after a fused projection."""
    batch, tokens, width = shape
    x, y = noise(batch, tokens, 3 * width, dtype=dtype).chunk(3, dim=-1)[1:]
    weight = noise(width, dtype=dtype)
    scale, gate = noise(batch, tokens if per_token else 1, 2, width).unbind(2)
    pair = noise(batch, tokens, 2 * width, dtype=dtype)
    return {
        "rms_norm_scale": lambda k: k.rms_norm_scale(x, weight, scale, 1e-5),
        "silu_gate": lambda k: k.silu_gate(pair),
        "gated_rms_norm": lambda k: k.gated_rms_norm(x, y, weight, gate, 1e-5),
    }


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["rms_norm_scale", "gated_rms_norm", "silu_gate"])
def test_fused_kernel_equals_its_definition(
    op: str, shape: tuple[int, int, int], dtype: torch.dtype, per_token: bool
) -> None:
    torch.manual_seed(0)
    call = calls(shape, dtype, per_token)[op]
    fused, plain = call(triton_kernels()), call(reference_kernels())
    assert fused.dtype == dtype
    assert fused.is_contiguous()
    torch.testing.assert_close(fused, plain, rtol=ULPS[dtype], atol=5e-5)


def build(dtype: torch.dtype, kernels: KernelSet) -> ZImageTransformer:
    """A small network with the published head dim and seeded weights."""
    config = ZImageConfig(512, 2, 4, n_refiner_layers=1, cap_feat_dim=64)
    with torch.device("cuda"):
        model = ZImageTransformer(config, ParallelMesh.single(), kernels)
    generator = torch.Generator("cuda").manual_seed(5)
    for name, parameter in model.named_parameters():
        fresh = torch.randn(parameter.shape, generator=generator, device="cuda")
        one = parameter.ndim == 1 and not name.endswith("bias")
        fresh = 1 + 0.1 * fresh if one else fresh * parameter.shape[-1] ** -0.5
        parameter.data = fresh.to(parameter_dtype(name, dtype))
    return model.to("cuda")


Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(batch: int = 2, caption: int = 40) -> Inputs:
    return noise(batch, 16, 1, 18, 22), torch.rand(batch, device="cuda"), noise(batch, caption, 64)


def predict(model: ZImageTransformer, sample: Inputs) -> Tensor:
    result: Tensor = model(sample[0], sample[1], ZImageText(model.caption(sample[2])))
    return result


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_fused_forward_in_float32_equals_plain_torch() -> None:
    sample = inputs()
    plain = predict(build(torch.float32, reference_kernels()), sample)
    fused = predict(build(torch.float32, triton_kernels()), sample)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-4)


def test_fused_forward_in_bfloat16_is_as_near_to_float32_as_plain_torch() -> None:
    sample = inputs()
    exact = predict(build(torch.float32, reference_kernels()), sample)
    plain = (predict(build(torch.bfloat16, reference_kernels()), sample) - exact).norm() / exact.norm()
    fused = (predict(build(torch.bfloat16, triton_kernels()), sample) - exact).norm() / exact.norm()
    assert fused <= 1.2 * plain
    assert fused < 0.03


def test_a_forward_never_waits_for_the_device() -> None:
    model, sample = build(torch.bfloat16, select_kernels(torch.device("cuda"))), inputs()
    predict(model, sample)  # kernels are compiled and loaded once
    with no_waits():
        predict(model, sample)


def test_a_forward_can_be_captured_and_replayed_on_other_values() -> None:
    model, (latents, time, embeds) = build(torch.bfloat16, triton_kernels()), inputs()
    out, static = torch.empty_like(latents), ZImageText(model.caption(embeds))
    rotary = model.rope(out.shape, static.caption.shape[1])
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(latents, time, static, out=out, rotary=rotary)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(latents, time, static, out=out, rotary=rotary)
    fresh = inputs()
    latents.copy_(fresh[0])
    time.copy_(fresh[1])
    static.caption.copy_(model.caption(fresh[2]))
    graph.replay()
    assert torch.equal(out, predict(model, fresh))


def test_compiled_blocks_equal_eager_ones_for_captions_of_any_length() -> None:
    """Lengths beyond the first share a graph, so a server does not compile one for each."""
    samples = [inputs(caption=length) for length in (40, 5, 100, 170, 240)]
    model = build(torch.float32, reference_kernels())
    eager = [predict(model, sample) for sample in samples]
    for kernels in (reference_kernels(), triton_kernels()):
        torch.compiler.reset()
        model = build(torch.float32, kernels)
        model.compile_blocks()
        for sample, expected in zip(samples, eager, strict=True):
            torch.testing.assert_close(predict(model, sample), expected, rtol=0, atol=1e-4)
