"""Weights in host memory give the bits of resident ones, and are on the device only when they are used."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deeper import deeper, deeper_wan, script
from msgspec import structs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.configs.families import identify
from safelight.configs.server_args import ServerArgs
from safelight.runtime.launch.folders import create_run_folder
from safelight.runtime.launch.processes import Group
from safelight.runtime.launch.specs import worker_spec
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec, SlotPool
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.models.residency import Residency
from safelight.runtime.models.streaming import StreamedBlocks
from safelight.runtime.models.wan.pipeline import WanPipeline, load
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.worker.main import _load, _options

CPU = torch.device("cpu")
ALL = ("dit", "text_encoder", "image_encoder", "vae")
LAYERS = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return deeper_wan(tmp_path_factory.mktemp("wan"), LAYERS)


def loaded(checkpoint: Path, *offload: str, dtype: torch.dtype = torch.float32, **others: Any) -> WanPipeline:
    with torch.inference_mode():  # as in a worker
        made = load_pipeline(
            checkpoint, LoadOptions(CPU, dtype, dtype, None, ParallelMesh.single(), offload=offload, **others)
        )
    assert isinstance(made, WanPipeline)
    return made


@pytest.fixture(scope="module")
def resident(checkpoint: Path) -> WanPipeline:
    return loaded(checkpoint)


@pytest.fixture
def offloaded(checkpoint: Path) -> WanPipeline:
    return loaded(checkpoint, *ALL)


def request(seed: int = 3, frames: int = 9, steps: int = 3, guidance: float = 4.0) -> GenerationRequest:
    ids = {"prompt": (5, 9, 12, seed, 1), "negative": (7, 1)}
    return GenerationRequest(
        "", "", ids, 32, 48, frames, 16, steps, guidance, seed, 1, "unipc", MediaSpec(MediaFormat.NPY)
    )


@torch.inference_mode()
def run(pipeline: WanPipeline, requests: list[GenerationRequest]) -> list[Tensor]:
    """Everything that a batch of jobs produces, with a save and load after the first step."""
    states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in requests]
    results = [t for s in states for t in (s.conditioning.positive, s.conditioning.negative) if t is not None]
    states = pipeline.step(states)
    states = [pipeline.load(r, s.conditioning, pipeline.save(s)) for r, s in zip(requests, states, strict=True)]
    while states[0].step < requests[0].num_inference_steps:
        states = pipeline.step(states)
        results += [state.latents for state in states]
    cursors: list[Any] = [None] * len(states)
    for _ in range(3):
        for number, state in enumerate(states):  # decodes of two jobs interleave
            chunk, cursors[number] = pipeline.decode(state, cursors[number])
            results.append(chunk.frames)
    assert cursors == [None] * len(states)
    return results


def stream_of(pipeline: WanPipeline) -> Any:
    [stream] = pipeline.residency.streams
    return stream


def addresses(module: nn.Module) -> list[int]:
    return [p.data_ptr() for p in module.parameters()]


# ---------------------------------------------------------------------------------------------------------------------
# The same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_op_gives_the_bits_of_resident_weights(checkpoint: Path, dtype: torch.dtype) -> None:
    requests = [request(seed=1), request(seed=2)]
    expected = run(loaded(checkpoint, dtype=dtype), requests)
    pipeline = loaded(checkpoint, *ALL, dtype=dtype)
    for _ in range(2):  # what the first round left behind changes nothing
        made = run(pipeline, requests)
        assert len(made) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert not torch.equal(expected[-1], expected[-2]), "the two jobs differ"


@pytest.mark.parametrize("part", ALL)
def test_each_component_moves_alone(checkpoint: Path, resident: WanPipeline, part: str) -> None:
    pipeline = loaded(checkpoint, part)
    made, expected = run(pipeline, [request()]), run(resident, [request()])
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert isinstance(pipeline.transformer.blocks, StreamedBlocks) == (part == "dit")


def test_flux_streams_both_kinds_of_blocks_and_moves_both_encoders(tmp_path: Path) -> None:
    script("make_checkpoint").make("flux1-dev", tmp_path)
    ids: dict[str, tuple[int, ...]] = {"prompt": (5, 9, 1), "clip.prompt": (3, 4, 5)}
    made = []
    with torch.inference_mode():
        for offload in ((), ALL):
            options = LoadOptions(CPU, torch.float32, torch.float32, None, ParallelMesh.single(), offload=offload)
            pipeline = load_pipeline(tmp_path, options)
            job = GenerationRequest(
                "", "", ids, 32, 48, 1, 1, 3, 3.5, 1, 1, "euler", MediaSpec(MediaFormat.NPY), true_cfg_scale=1.0
            )
            state = pipeline.prepare(job, pipeline.encode(job), 0)
            for _ in range(3):
                (state,) = pipeline.step([state])
            made.append([state.latents, pipeline.decode(state, None)[0].frames])
            assert options.residency.components_on_device() == ()
    blocks, modulation = options.residency.streams
    assert (len(blocks), blocks.copies) == (4, 3 * 4 + 1)
    assert (len(modulation), modulation.copies) == (4, 4 + 1), "once for all steps"
    assert options.residency.unused() == ["image_encoder"]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize(
    ("family", "blocks", "count", "streams"),
    [("qwen-image", "transformer_blocks", "num_layers", 2), ("z-image", "layers", "n_layers", 1)],
)
def test_prompts_of_different_lengths_share_a_pass_over_the_blocks(
    tmp_path: Path, family: str, blocks: str, count: str, streams: int
) -> None:
    deeper(family, tmp_path, blocks, count, 4)
    texts = {"prompt": tuple(range(3, 73)), "negative": tuple(range(3, 40))}
    made: list[list[Tensor]] = []
    with torch.inference_mode():
        for offload in ((), ("dit",)):
            options = LoadOptions(CPU, torch.float32, torch.float32, None, ParallelMesh.single(), offload=offload)
            pipeline: Any = load_pipeline(tmp_path, options)
            jobs = [
                GenerationRequest(
                    "", "", {"prompt": texts["prompt"][:length], "negative": texts["negative"]}, 32, 48, 1, 1, 3, 4.0,
                    length, 1, "euler", MediaSpec(MediaFormat.NPY), true_cfg_scale=4.0, cfg_normalization=0.0,
                    cfg_truncation=1.0,
                )
                for length in (70, 41)
            ]  # fmt: skip
            states = [pipeline.prepare(job, pipeline.encode(job), 0) for job in jobs]
            shapes = {s.conditioning.shapes(branch) for s in states for branch in (0, 1)}
            assert len(shapes) > 1
            for _ in range(3):
                states = pipeline.step(states)
            made.append([state.latents for state in states])
    assert len(options.residency.streams) == streams
    stream = options.residency.streams[0]
    assert (len(stream), stream.copies) == (4, 3 * 4 + 1), "one pass a step"
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_weights_of_another_block_would_show(resident: WanPipeline, offloaded: WanPipeline) -> None:
    """The negative control: a copy that does not happen changes the result."""
    stream = stream_of(offloaded)
    expected = run(resident, [request()])
    run(offloaded, [request()])
    stream._bring = lambda index: None
    assert not torch.equal(run(offloaded, [request()])[-1], expected[-1])


def test_compiled_blocks_are_streamed(checkpoint: Path, resident: WanPipeline) -> None:
    """One graph for all blocks, as for resident ones: parameters keep their identity and address."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipeline = loaded(checkpoint, "dit")
    for block in pipeline.transformer.blocks._modules.values():
        assert block is not None
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        states = [pipeline.prepare(request(), pipeline.encode(request()), 0)]
        plain = [resident.prepare(request(), resident.encode(request()), 0)]
        for _ in range(3):
            states, plain = pipeline.step(states), resident.step(plain)
    assert torch.equal(states[0].latents, plain[0].latents)
    assert len(graphs) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is on the device, and when


def test_blocks_are_copied_once_a_forward_and_live_in_two_buffers(
    checkpoint: Path, resident: WanPipeline, offloaded: WanPipeline
) -> None:
    stream, blocks = stream_of(offloaded), list(offloaded.transformer.blocks._modules.values())
    kept = [addresses(b) for b in blocks if b is not None]
    size = stream.device_bytes // 2
    assert stream.host_bytes == 4 * size, "the last of five stays on the device"
    assert stream.copies == 0
    with torch.inference_mode():
        state = offloaded.prepare(request(), offloaded.encode(request()), 0)
        for step in range(1, 4):
            (state,) = offloaded.step([state])
            assert stream.copies == 4 * step + 1, "each once, and the first one for the next forward"
    assert [addresses(b) for b in blocks if b is not None] == kept
    ranges = [(min(a), max(a)) for a in kept]
    assert ranges[0] == ranges[2]
    assert ranges[1] == ranges[3]
    assert len(set(ranges)) == 3
    assert all(a % 64 == 0 for block in kept[:4] for a in block)


def test_encoder_and_vae_are_on_the_device_only_for_their_ops(offloaded: WanPipeline) -> None:
    here = offloaded.residency.components_on_device
    encoder, vae = offloaded.text_encoder.module, offloaded.vae.module
    homes = addresses(encoder), addresses(vae)
    objects = list(map(id, vae.parameters()))
    assert here() == ()
    with torch.inference_mode():
        states = [offloaded.prepare(r, offloaded.encode(r), 0) for r in (request(seed=1), request(seed=2))]
        assert here() == ()
        _, cursor = offloaded.decode(states[0], None)
        assert here() == ("vae",)
        first = addresses(vae)
        assert not set(first) & set(homes[1])
        offloaded.step(states)
        _, cursor = offloaded.decode(states[0], cursor)
        assert addresses(vae) == first, "not moved again for the next chunk"
        offloaded.encode(request())
        assert here() == (), "the encoder needed the room"
        _, other = offloaded.decode(states[1], None)
        _, cursor = offloaded.decode(states[0], cursor)
        assert cursor is None
        assert here() == (), "the end of a sequence, although the other one is not done"
        _, other = offloaded.decode(states[1], other)
        assert other is not None
    assert (addresses(encoder), list(map(id, vae.parameters()))) == (homes[0], objects)


def test_a_failure_leaves_everything_usable(
    resident: WanPipeline, offloaded: WanPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(resident, [request()])
    encoder, vae = offloaded.text_encoder.module, offloaded.vae.module
    blocks: Any = [b for b in offloaded.transformer.blocks._modules.values() if b is not None]

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with torch.inference_mode():
        state = offloaded.prepare(request(), offloaded.encode(request()), 0)
        _, cursor = offloaded.decode(state, None)
        for owner, name, call in (
            (encoder.encoder.block[1], "forward", lambda: offloaded.encode(request())),
            (vae.decoder.mid_block, "forward", lambda: offloaded.decode(state, cursor)),
            (blocks[3], "forward", lambda: offloaded.step([state])),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fails)
                with pytest.raises(RuntimeError, match="out of memory"):
                    call()
            assert offloaded.residency.components_on_device() == ()
    assert all(torch.equal(a, b) for a, b in zip(run(offloaded, [request()]), expected, strict=True))


def test_a_component_that_does_not_fit_leaves_no_half_of_it(offloaded: WanPipeline) -> None:
    vae, allocate = offloaded.vae.module, torch.empty_like
    homes = addresses(vae)
    calls = iter(range(100))

    def short(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(*args, **kwargs)

    visit = offloaded.residency.on_device("vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", short)
        with pytest.raises(torch.OutOfMemoryError):
            visit.__enter__()
    assert addresses(vae) == homes
    assert offloaded.residency.components_on_device() == ()


def test_visits_do_not_nest(offloaded: WanPipeline) -> None:
    inner = offloaded.residency.on_device("text_encoder")
    with offloaded.residency.on_device("vae"), pytest.raises(RuntimeError, match="one after the other"):
        inner.__enter__()
    with offloaded.residency.on_device("text_encoder"):
        assert offloaded.residency.components_on_device() == ("text_encoder",)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_the_bytes_reported_are_what_stays_and_what_moves_in(
    checkpoint: Path, resident: WanPipeline, offloaded: WanPipeline
) -> None:
    blocks = parameter_bytes(resident.transformer.blocks)
    encoder, vae = parameter_bytes(resident.text_encoder.module), parameter_bytes(resident.vae.module)
    around = parameter_bytes(resident.transformer) - blocks
    assert resident.weights_bytes() == around + blocks + encoder + vae
    stream = stream_of(offloaded)
    assert blocks / LAYERS <= stream.device_bytes / 2 <= blocks / LAYERS * 1.3, "a block and its padding"
    expected = around + blocks // LAYERS + stream.device_bytes + vae
    assert offloaded.weights_bytes() == expected
    assert offloaded.residency.encode_bytes == max(0, encoder - vae)
    alone = loaded(checkpoint, "text_encoder")
    assert alone.weights_bytes() == resident.weights_bytes() - encoder
    assert alone.residency.encode_bytes == encoder
    with torch.inference_mode():
        offloaded.encode(request())
        with offloaded.residency.on_device("vae"):
            assert offloaded.weights_bytes() == expected, "whatever is on the device at the moment"


class Copied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that copies bring to the device "meta", which holds shapes only."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("copy_", "_to_copy") and made.is_meta:
            self.nbytes += made.numel() * made.element_size()
        return made


@pytest.mark.parametrize("offload", [ALL, ("dit",), ("vae", "text_encoder"), ()])
def test_loading_brings_only_what_stays_to_the_device(
    checkpoint: Path, resident: WanPipeline, offload: tuple[str, ...]
) -> None:
    options = LoadOptions(
        torch.device("meta"), torch.float32, torch.float32, None, ParallelMesh.single(), offload=offload
    )
    with Copied() as copied, torch.inference_mode(False), torch.no_grad():  # inference mode hides what composites do
        pipeline = load(identify(checkpoint), options)
    staying = parameter_bytes(resident.transformer)
    if "dit" in offload:
        staying -= parameter_bytes(resident.transformer.blocks) * (LAYERS - 1) // LAYERS
    for name, module in (("text_encoder", resident.text_encoder.module), ("vae", resident.vae.module)):
        staying += 0 if name in offload else parameter_bytes(module)
    buffers = [
        b for m in (pipeline.transformer, pipeline.text_encoder.module, pipeline.vae.module) for b in m.buffers()
    ]
    assert all(b.is_meta for b in buffers)
    small = sum(b.numel() * b.element_size() for b in buffers) + 1024  # mean and deviation of latents
    assert staying <= copied.nbytes <= staying + small
    assert pipeline.text_encoder.device.type == "meta"
    assert pipeline.vae.mean.is_meta


def test_tied_parameters_stay_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    model["b"].weight = model["a"].weight
    residency = Residency(CPU, ("text_encoder",))
    built = residency.load("text_encoder", lambda home: model)
    assert built is model
    with residency.on_device("text_encoder") as visit:
        assert model["a"].weight is model["b"].weight
        visit.more = True
    assert residency.components_on_device() == ("text_encoder",)
    assert residency.weights_bytes(model) == 0
    assert residency.encode_bytes == 4 * (9 + 3 + 3 + 3 + 3)


def test_several_text_encoders_are_one_component() -> None:
    @dataclass(frozen=True)
    class Encoder:
        module: nn.Module
        device: torch.device

    residency = Residency(CPU, ("text_encoder", "vae"))
    both = [residency.load("text_encoder", lambda home: Encoder(nn.Linear(2, 2), home)) for _ in range(2)]
    homes = [addresses(encoder.module) for encoder in both]
    with residency.on_device("text_encoder"):
        assert all(addresses(e.module) != h for e, h in zip(both, homes, strict=True))
    assert [addresses(encoder.module) for encoder in both] == homes
    assert residency.encode_bytes == 2 * 4 * 6
    assert residency.unused() == ["vae"]
    assert "text_encoder 0.00 GB" in residency.describe()


# ---------------------------------------------------------------------------------------------------------------------
# Flags


FLAGS: dict[str, dict[str, Any]] = {
    "dit": {"dit_cpu_offload": True},
    "text_encoder": {"text_encoder_cpu_offload": True},
    "image_encoder": {"image_encoder_cpu_offload": True},
    "vae": {"vae_cpu_offload": True},
}


@pytest.mark.parametrize("part", [*FLAGS, None])
def test_each_flag_reaches_the_model(
    checkpoint: Path, tmp_path: Path, part: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    args = ServerArgs(device="cpu", pin_cpu_memory=part != "vae", **(FLAGS[part] if part else {}))
    run = create_run_folder(tmp_path / "state")
    worker = worker_spec(args, run, SlotPool("x", 1, 1), checkpoint, "cpu", Group(0), 0)
    assert worker.pin_cpu_memory == (part != "vae")
    with caplog.at_level(logging.INFO, "safelight.runtime.worker.main"):
        made = _load(worker, _options(worker, CPU))
    assert isinstance(made, WanPipeline)
    assert isinstance(made.transformer.blocks, StreamedBlocks) == (part == "dit")
    assert made.residency.components_on_device() == ()
    for name in ("text_encoder", "vae"):
        with made.residency.on_device(name):
            assert made.residency.components_on_device() == ((name,) if part == name else ())
    lines = [(record.levelname, record.message) for record in caplog.records]
    if part == "image_encoder":
        assert lines == [("WARNING", "--image-encoder-cpu-offload does nothing: this model has no such component")]
    elif part:
        assert [level for level, _ in lines] == ["INFO"]
        assert lines[0][1].startswith(f"offloaded, in pageable host memory: {part} ")
    else:
        assert not lines
    with caplog.at_level(logging.INFO, "safelight.runtime.worker.main"):
        caplog.clear()
        _load(structs.replace(worker, group=1), _options(worker, CPU))
    assert "WARNING" not in {record.levelname for record in caplog.records}, "one rank of all says so"


def test_the_benchmark_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The same code as on a GPU, without a cap."""
    modules = [name for name in sys.modules if name.startswith("safelight.runtime.models")]
    kept = {name: dict(vars(sys.modules[name])) for name in modules}
    size = ["--frames", "5", "--height", "32", "--width", "48", "--steps", "1"]
    try:
        script("bench_offload").main(["--family", "wan", "--size", "tiny", *size])
    finally:
        for name, values in kept.items():  # it takes the place of what reads weights
            vars(sys.modules[name]).update(values)
    report = json.loads(capsys.readouterr().out)
    assert report["equal"] == [True, True, True]
    assert report["resident"]["ms_per_step"] > 0
    assert set(report["offloaded"]["peak_gb"]) == {"load", "encode", "step", "decode"}
