"""On a CUDA device: the fused kernels against their definition, and the transformer against itself in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from device_waits import no_waits
from torch import Tensor

from safelight.kernels.dispatch import KernelSet, reference_kernels, select_kernels, triton_kernels
from safelight.runtime.models.wan.transformer import WanConfig, WanText, WanTransformer
from safelight.runtime.models.wan.weights import parameter_dtype
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
OPS = [
    "rms_norm",
    "rms_norm_rope",
    "rms_norm_rope_heads",
    "layer_norm",
    "layer_norm_modulate",
    "gated_residual",
]
SHAPES = [(1, 1, 48), (2, 7, 96), (1, 333, 1536), (2, 65, 5120)]  # (B, S, E), heads of 12, 24, 128, 128


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def calls(shape: tuple[int, int, int], dtype: torch.dtype, per_token: bool) -> dict[str, Call]:
    """Every fused op on fresh inputs; x is a slice of a wider row, as after a fused projection."""
    batch, tokens, width = shape
    pairs = {48: 6, 96: 12}.get(width, 64)
    x, y = noise(batch, tokens, 3 * width, dtype=dtype).chunk(3, dim=-1)[1:]
    weight, bias = noise(width), noise(width)
    scale, shift, gate = noise(batch, tokens if per_token else 1, 3, width).unbind(2)
    angles = noise(tokens, pairs) * 10
    of_head = noise(2 * pairs, dtype=dtype)
    return {
        "rms_norm": lambda k: k.rms_norm(x, weight.to(dtype), 1e-6),
        "rms_norm_rope": lambda k: k.rms_norm_rope(x, weight.to(dtype), angles.cos(), angles.sin(), 1e-6),
        "rms_norm_rope_heads": lambda k: k.rms_norm_rope_heads(x, of_head, angles.cos(), angles.sin(), 1e-6, None),
        "layer_norm": lambda k: k.layer_norm(x, weight, bias, 1e-6),
        "layer_norm_modulate": lambda k: k.layer_norm_modulate(x, scale, shift, 1e-6),
        "gated_residual": lambda k: k.gated_residual(x, y, gate),
    }


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_fused_kernel_equals_its_definition(
    op: str, shape: tuple[int, int, int], dtype: torch.dtype, per_token: bool
) -> None:
    torch.manual_seed(0)
    call = calls(shape, dtype, per_token)[op]
    fused, plain = call(triton_kernels()), call(reference_kernels())
    assert fused.dtype == dtype
    assert fused.is_contiguous()
    torch.testing.assert_close(fused, plain, rtol=ULPS[dtype], atol=2e-5)


def test_heads_are_written_into_a_part_of_another_tensor() -> None:
    """Several samples, so that the rows of the target do not lie at one stride."""
    x, angles, weight = noise(2, 65, 1024, dtype=torch.bfloat16), noise(65, 64), noise(128, dtype=torch.bfloat16)
    place = torch.zeros(2, 70, 1280, dtype=torch.bfloat16, device="cuda")
    out = place[:, 5:, 256:]
    arguments = x, weight, angles.cos(), angles.sin(), 1e-6
    assert triton_kernels().rms_norm_rope_heads(*arguments, out).data_ptr() == out.data_ptr()
    expected = reference_kernels().rms_norm_rope_heads(*arguments, None)
    torch.testing.assert_close(out, expected, rtol=ULPS[torch.bfloat16], atol=2e-5)
    assert place[:, :5].abs().sum() == place[..., :256].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gelu_in_the_product_is_no_less_exact_than_after_it(dtype: torch.dtype) -> None:
    x, weight, bias = noise(2, 333, 512, dtype=dtype), noise(1024, 512) / 512**0.5, noise(1024, dtype=dtype)
    weight = weight.to(dtype)
    exact = torch.nn.functional.gelu(x.double() @ weight.double().T + bias.double(), approximate="tanh")
    fused, plain = (
        (k.linear_gelu(x, weight, bias).double() - exact).norm() / exact.norm()
        for k in (triton_kernels(), reference_kernels())
    )
    assert fused <= 1.05 * plain
    assert fused < 4 * torch.finfo(dtype).eps


def build(dtype: torch.dtype, kernels: KernelSet) -> WanTransformer:
    """A small network with the published head dim and seeded weights."""
    config = WanConfig(4, 128, 16, 16, text_dim=64, freq_dim=64, ffn_dim=1024, num_layers=3)
    with torch.device("cuda"):
        model = WanTransformer(config, ParallelMesh.single(), kernels)
    generator = torch.Generator("cuda").manual_seed(5)
    for name, parameter in model.named_parameters():
        fresh = torch.randn(parameter.shape, generator=generator, device="cuda")
        fresh = 1 + 0.1 * fresh if "norm" in name else fresh * parameter.shape[-1] ** -0.5
        parameter.data = fresh.to(parameter_dtype(name, dtype))
    return model.to("cuda")


def inputs(frames: int = 3, batch: int = 2) -> tuple[Tensor, Tensor, WanText]:
    return noise(batch, 16, frames, 18, 22), torch.rand(batch, device="cuda") * 1000, WanText(noise(batch, 64, 64))


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
    assert fused < 0.03


def test_a_forward_never_waits_for_the_device() -> None:
    model, sample = build(torch.bfloat16, select_kernels(torch.device("cuda"))), inputs()
    model(*sample)  # kernels are compiled and loaded once
    with no_waits():
        model(*sample)


def test_a_forward_can_be_captured_and_replayed_on_other_values() -> None:
    model, static, out = build(torch.bfloat16, triton_kernels()), inputs(), torch.empty(2, 16, 3, 18, 22, device="cuda")
    rotary = model.rope(out.shape)
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
    graph.replay()
    assert torch.equal(out, model(*fresh))


def test_compiled_blocks_equal_eager_ones() -> None:
    sample = inputs(frames=2)
    eager = build(torch.float32, reference_kernels())(*sample)
    for kernels in (reference_kernels(), triton_kernels()):
        model = build(torch.float32, kernels)
        model.compile_blocks()
        torch.testing.assert_close(model(*sample), eager, rtol=0, atol=1e-4)
