"""On a CUDA device: streamed blocks give the bits of resident ones, never wait, and keep to their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deeper import deeper, deeper_wan, script
from device_waits import no_waits

from safelight.kernels.dispatch import select_kernels
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.models.residency import Residency
from safelight.runtime.models.wan.pipeline import WanPipeline
from safelight.runtime.models.wan.transformer import WanConfig, WanText, WanTransformer
from safelight.runtime.models.wan.weights import parameter_dtype
from safelight.runtime.parallel.mesh import ParallelMesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32"),  # on compiling for float32
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # torch's own, on compiling
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # "is a prototype feature"
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ALL = ("dit", "text_encoder", "vae")
LIMIT = 2 << 30  # bytes beside what stays, while loading
WIDE = WanConfig(12, 128, 16, 16, 512, 256, 8960, 8)  # 53 M parameters a block


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deeper_wan(tmp_path_factory.mktemp("wan"), 5)


def request(seed: int = 3) -> GenerationRequest:
    ids = {"prompt": (5, 9, 12, seed, 1), "negative": (7, 1)}
    return GenerationRequest("", "", ids, 32, 48, 9, 16, 4, 4.0, seed, 1, "unipc", MediaSpec(MediaFormat.NPY))


def loaded(checkpoint: Path, *offload: str, pin: bool = True) -> Any:
    mesh, bf16 = ParallelMesh.single(), torch.bfloat16
    with torch.inference_mode():
        return load_pipeline(
            checkpoint,
            LoadOptions(torch.device("cuda"), bf16, bf16, None, mesh, offload=offload, pin_cpu_memory=pin),
        )


@torch.inference_mode()
def run(pipeline: WanPipeline) -> list[torch.Tensor]:
    states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in (request(1), request(2))]
    results = [state.conditioning.positive for state in states]
    for _ in range(4):
        states = pipeline.step(states)
        results += [state.latents for state in states]
    cursor: Any = None
    for _ in range(3):
        chunk, cursor = pipeline.decode(states[0], cursor)
        results.append(chunk.frames)
    return [result.cpu() for result in results]


@pytest.mark.parametrize("pin", [True, False])
def test_every_op_gives_the_bits_of_resident_weights(checkpoint: Path, pin: bool) -> None:
    expected, pipeline = run(loaded(checkpoint)), loaded(checkpoint, *ALL, pin=pin)
    [stream] = pipeline.residency.streams
    assert stream._host.bytes.is_pinned() == pin
    for _ in range(3):
        assert [torch.equal(a, b) for a, b in zip(run(pipeline), expected, strict=True)] == [True] * len(expected)
    assert pipeline.residency.components_on_device() == ()
    assert next(pipeline.vae.module.parameters()).device.type == "cpu"


def test_no_op_waits_for_the_device(checkpoint: Path) -> None:
    pipeline = loaded(checkpoint, *ALL)
    run(pipeline)  # the first use of a kernel may load it
    with torch.inference_mode():
        state = pipeline.prepare(request(), pipeline.encode(request()), 0)
        with no_waits():
            for _ in range(4):
                (state,) = pipeline.step([state])
            with pipeline.residency.on_device("text_encoder"):
                pass
            with pipeline.residency.on_device("vae"):
                pass
    assert torch.isfinite(state.latents).all()


def wide(device: torch.device, homes: dict[str, torch.device]) -> WanTransformer:
    """A transformer of 0.9 GB, with random weights made where they live; the same each time."""
    with torch.device("meta"):
        model = WanTransformer(WIDE, ParallelMesh.single(), select_kernels(device))
    fill = script("bench_offload").random_weights
    fill(model, [], {}, device, lambda name: parameter_dtype(name, torch.bfloat16), homes=homes)
    return model.eval()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_buffer_is_not_overwritten_while_it_is_read(compiled: bool) -> None:
    """Short computations between large copies, and long ones: either way round the bits are the resident ones. The
    memory is what stays and the two buffers."""
    device, torch_inputs = torch.device("cuda"), torch.Generator("cuda").manual_seed(1)
    with torch.inference_mode():
        resident = wide(device, {})
        blocks = sum(p.nbytes for p in resident.blocks.parameters())
        inputs = [
            (torch.randn(1, 16, f, 60, 104, device=device, generator=torch_inputs), torch.rand(1, device=device) * 999)
            for f in (1, 5, 1, 1, 5)
        ]
        text = WanText(torch.randn(1, 512, 512, device=device, generator=torch_inputs))
        if compiled:
            resident.compile_blocks()
        expected = [resident(latents, t, text) for latents, t in inputs]
        del resident
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        residency = Residency(device, ("dit",), pin=True)
        streamed = wide(device, residency.homes("blocks"))
        if compiled:
            streamed.compile_blocks()
        residency.stream(streamed, "blocks")
        stays = torch.cuda.memory_allocated() - before
        assert stays <= residency.weights_bytes(streamed) + (8 << 20)
        assert residency.weights_bytes(streamed) < 0.4 * blocks
        assert torch.cuda.max_memory_allocated() - before <= stays + (256 << 20), "blocks are never all there"
        for _ in range(3):
            made = [streamed(latents, t, text) for latents, t in inputs]
            assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize(
    ("family", "blocks", "count"),
    [("qwen-image", "transformer_blocks", "num_layers"), ("z-image", "layers", "n_layers")],
)
def test_prompts_of_different_lengths_share_a_pass_over_the_blocks(
    tmp_path: Path, family: str, blocks: str, count: str
) -> None:
    """With the bits of forwards of their own, and without waiting."""
    deeper(family, tmp_path, blocks, count, 6)
    made: list[list[torch.Tensor]] = []
    for offload in ((), ("dit",)):
        pipeline: Any = loaded(tmp_path, *offload)
        texts = {"prompt": tuple(range(3, 73)), "negative": tuple(range(3, 40))}
        job = GenerationRequest(
            "", "", texts, 64, 96, 1, 1, 18, 4.0, 1, 1, "euler", MediaSpec(MediaFormat.NPY), true_cfg_scale=4.0,
            cfg_normalization=0.0, cfg_truncation=1.0,
        )  # fmt: skip
        with torch.inference_mode():
            state = pipeline.prepare(job, pipeline.encode(job), 0)
            states = [(state := pipeline.step([state])[0]).latents for _ in range(2)]
            with no_waits():
                states += [(state := pipeline.step([state])[0]).latents for _ in range(16)]
        made.append(states)
    assert pipeline.residency.streams[0].copies == 18 * 6 + 1
    assert [torch.equal(a, b) for a, b in zip(*made, strict=True)] == [True] * 18


def test_loading_keeps_to_what_stays_and_two_gigabytes(checkpoint: Path) -> None:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pipeline = loaded(checkpoint, *ALL)
    stays = torch.cuda.memory_allocated() - before
    assert stays <= pipeline.weights_bytes() + (8 << 20)
    assert torch.cuda.max_memory_allocated() - before <= stays + LIMIT
