"""The Wan pipeline against diffusers' WanPipeline, and the promises that the executor relies on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.configs.families import FAMILIES, identify
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.server_args import ServerArgs
from safelight.runtime.errors import InvalidRequest, JobFailed, ModelError
from safelight.runtime.launch.folders import create_run_folder
from safelight.runtime.launch.processes import Group
from safelight.runtime.launch.specs import worker_spec
from safelight.runtime.messages import GenerationRequest, SlotPool
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.models.wan.pipeline import WanPipeline
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState, Pipeline
from safelight.runtime.worker.main import _load, _options

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    """A module of scripts/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TABLE = script("parity_table").family("wan")
Case = TABLE.Case


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("wan")
    script("make_checkpoint").make("wan2.1-t2v", folder)
    return folder


@pytest.fixture(scope="module")
def parity(checkpoint: Path) -> Any:
    return TABLE.Parity(checkpoint)


@pytest.fixture(scope="module")
def pipeline(parity: Any) -> WanPipeline:
    assert isinstance(parity.ours, WanPipeline)
    return parity.ours


@pytest.fixture
def request_of(parity: Any) -> Callable[..., GenerationRequest]:
    def make(**settings: Any) -> GenerationRequest:
        made: GenerationRequest = parity.request(Case("", **settings))
        return made

    return make


@torch.inference_mode()
def start(pipeline: Pipeline, request: GenerationRequest, index: int = 0) -> DenoiseState:
    return pipeline.prepare(request, pipeline.encode(request), index)


@torch.inference_mode()
def advance(pipeline: Pipeline, state: DenoiseState, steps: int | None = None) -> DenoiseState:
    for _ in range(state.request.num_inference_steps - state.step if steps is None else steps):
        (state,) = pipeline.step([state])
    return state


def tensors_of(state: DenoiseState) -> list[torch.Tensor]:
    last = [] if state.sampler.last_sample is None else [state.sampler.last_sample]
    text = [t for t in (state.conditioning.positive, state.conditioning.negative) if t is not None]
    return [state.latents, state.sigmas, state.rng_state, *state.sampler.model_outputs, *last, *text]


# ---------------------------------------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize("case", TABLE.CASES, ids=lambda case: case.name)
def test_latents_and_frames_match_diffusers(parity: Any, case: Any) -> None:
    ours = parity.run_ours(case)
    assert ours[1].shape == (case.outputs, case.num_frames, case.height, case.width, 3)
    latents, levels = TABLE.errors(ours, parity.run_reference(case))
    assert latents <= TABLE.TOLERANCE
    assert levels <= 1


@pytest.mark.parametrize("control", TABLE.CONTROLS, ids=lambda control: control.name)
def test_something_wrong_is_far_outside_the_tolerance(parity: Any, control: Any) -> None:
    ours = parity.run_ours(control.case or TABLE.CASES[0], control.spoil(parity.ours))
    latents, _ = TABLE.errors(ours, parity.run_reference(TABLE.CASES[0]))
    assert latents > TABLE.CONTROL_FACTOR * TABLE.TOLERANCE


def test_noise_equals_a_list_of_generators_and_depends_on_seed_plus_index(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    request = request_of(seed=11, outputs=3)
    ours = torch.stack([start(pipeline, request, index).latents for index in range(3)])
    generators = [torch.Generator().manual_seed(11 + index) for index in range(3)]
    assert torch.equal(ours, randn_tensor(tuple(ours.shape), generator=generators, dtype=torch.float32))


def test_the_unconditional_branch_is_encoded_only_when_guided_and_padding_is_zero(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    request = request_of(guidance=5.0)
    with torch.inference_mode():
        guided, unguided = pipeline.encode(request), pipeline.encode(request_of(guidance=1.0))
    assert unguided.negative is None
    assert guided.negative is not None
    length = len(request.token_ids["prompt"])
    assert guided.positive.shape == (512, 32)
    assert torch.count_nonzero(guided.positive[length:]) == 0
    assert torch.count_nonzero(guided.positive[length - 1]) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Batches, purity, checkpoints


def test_a_batch_of_two_different_requests_equals_two_runs_of_one(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    """Other prompts, seeds, guidance, step counts, samplers, and the first is three steps ahead."""
    first = start(pipeline, request_of(prompt="a cat", guidance=5.0, steps=7, seed=1))
    second = start(pipeline, request_of(prompt="the blue dog", guidance=2.5, steps=4, seed=2, sampler="euler"))
    first = advance(pipeline, first, 3)
    alone = advance(pipeline, first), advance(pipeline, second)
    states = [first, second]
    with torch.inference_mode():
        for _ in range(4):
            states = pipeline.step(states)
    for batched, single in zip(states, alone, strict=True):
        assert batched.step == single.step == batched.request.num_inference_steps
        assert (batched.latents - single.latents).abs().max() <= 1e-5


def test_a_step_changes_nothing_that_it_was_given(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    state = advance(pipeline, start(pipeline, request_of(steps=5)), 2)
    before = [t.clone() for t in tensors_of(state)]
    first, again = advance(pipeline, state, 1), advance(pipeline, state, 1)
    assert torch.equal(first.latents, again.latents)
    assert state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))


def test_a_failed_step_leaves_its_states_usable(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    class Failing(nn.Module):
        dtype = torch.float32

        def forward(self, *_: Any) -> torch.Tensor:
            raise RuntimeError("out of memory")

    state = advance(pipeline, start(pipeline, request_of(steps=4)), 1)
    broken: Any = replace(pipeline, transformer=Failing())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out of memory"):
        advance(broken, state, 1)
    undisturbed = advance(pipeline, start(pipeline, request_of(steps=4)))
    assert torch.equal(advance(pipeline, state).latents, undisturbed.latents)


@pytest.mark.parametrize("sampler", ["unipc", "euler"])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_saving_and_loading_after_any_step_changes_no_bit(
    pipeline: WanPipeline,
    request_of: Callable[..., GenerationRequest],
    tmp_path: Path,
    sampler: str,
    guidance: float,
) -> None:
    request = request_of(sampler=sampler, guidance=guidance, steps=6, num_frames=1)
    whole = advance(pipeline, start(pipeline, request, 1))
    for k in range(7):
        save_file(pipeline.save(advance(pipeline, start(pipeline, request, 1), k)), tmp_path / f"{k}.safetensors")
        with torch.inference_mode():
            conditioning = pipeline.encode(request)
        resumed = pipeline.load(request, conditioning, load_file(tmp_path / f"{k}.safetensors"))
        assert (resumed.step, resumed.index) == (k, 1)
        end = advance(pipeline, resumed)
        assert torch.equal(end.latents, whole.latents), k
        assert torch.equal(end.rng_state, whole.rng_state)


def test_a_saved_state_is_a_copy(pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]) -> None:
    state = advance(pipeline, start(pipeline, request_of()), 2)
    saved = pipeline.save(state)
    kept = state.latents.clone()
    saved["latents"].zero_()
    assert torch.equal(state.latents, kept)


def test_a_checkpoint_of_another_request_is_refused(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    state = advance(pipeline, start(pipeline, request_of(steps=4)), 2)
    saved = pipeline.save(state)
    for other in (request_of(steps=5), request_of(width=80)):
        with pytest.raises(JobFailed, match="another request"):
            pipeline.load(other, state.conditioning, saved)
    older = saved | {"header": saved["header"] * 0}
    with pytest.raises(JobFailed, match="version"):
        pipeline.load(state.request, state.conditioning, older)
    with pytest.raises(JobFailed, match="sigmas"):
        pipeline.load(state.request, state.conditioning, {k: v for k, v in saved.items() if k != "sigmas"})


def test_a_step_never_reads_a_value_back_from_the_device(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    """`.item()`, `bool(tensor)` and data-dependent shapes all go through these operators."""
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"}
    seen: set[str] = set()

    class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    state = start(pipeline, request_of(steps=4))
    mode: Any = Record
    with mode(), torch.inference_mode(False), torch.no_grad():  # inference mode hides what composites are made of
        for _ in range(4):
            (state,) = pipeline.step([state])
    assert "addmm" in seen
    assert not seen & waiting


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@torch.inference_mode()
def test_decodes_of_two_jobs_interleave_and_chunks_can_be_decoded_again(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    states = [advance(pipeline, start(pipeline, request_of(num_frames=13, seed=s)), 1) for s in (1, 2)]
    whole = [TABLE.decode_all(pipeline, state) for state in states]
    assert not torch.equal(*whole)
    cursors: list[Any] = [None, None]
    parts: list[list[torch.Tensor]] = [[], []]
    for _ in range(4):
        for job, state in enumerate(states):
            discarded, _ = pipeline.decode(state, cursors[job])
            chunk, cursors[job] = pipeline.decode(state, cursors[job])
            assert torch.equal(chunk.frames, discarded.frames)
            parts[job].append(chunk.frames)
    assert cursors == [None, None]
    assert all(torch.equal(torch.cat(part), frames) for part, frames in zip(parts, whole, strict=True))


@torch.inference_mode()
def test_a_cursor_is_not_changed_by_decoding_from_it(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    state = start(pipeline, request_of(num_frames=13))
    _, cursor = pipeline.decode(state, None)
    _, cursor = pipeline.decode(state, cursor)
    assert cursor is not None
    before = [f.clone() if isinstance(f, torch.Tensor) else f for f in cursor.features]
    pipeline.decode(state, cursor)
    for old, kept in zip(before, cursor.features, strict=True):
        if isinstance(old, torch.Tensor):
            assert isinstance(kept, torch.Tensor)
            assert torch.equal(old, kept)
        else:
            assert old == kept


# ---------------------------------------------------------------------------------------------------------------------
# The profile tells the truth


@pytest.mark.parametrize(
    ("flags", "dit", "vae"),
    [
        ({}, torch.float32, torch.float32),
        ({"dit_precision": "bf16"}, torch.bfloat16, torch.float32),
        ({"vae_precision": "fp16"}, torch.float32, torch.float16),
        ({"dit_precision": "fp16", "vae_precision": "bf16"}, torch.float16, torch.bfloat16),
    ],
)
def test_the_precision_flags_reach_the_weights(
    checkpoint: Path, tmp_path: Path, flags: dict[str, str], dit: torch.dtype, vae: torch.dtype
) -> None:
    args, run = ServerArgs(device="cpu", **flags), create_run_folder(tmp_path / "state")  # type: ignore[arg-type]
    worker = worker_spec(args, run, SlotPool("x", 1, 1), checkpoint, "cpu", Group(0), 0)
    loaded = _load(worker, _options(worker, torch.device("cpu")))
    assert isinstance(loaded, WanPipeline)
    assert loaded.transformer.dtype == dit
    assert {p.dtype for p in loaded.vae.module.parameters()} == {vae}
    matrices = {p.dtype for block in loaded.transformer.blocks for p in block.parameters() if p.ndim == 2}
    assert matrices == {dit}


@pytest.mark.parametrize("settings", [{}, {"num_frames": 13, "guidance": 1.0}, {"num_frames": 1, "sampler": "euler"}])
def test_the_profile_describes_what_the_pipeline_holds(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest], settings: dict[str, Any]
) -> None:
    request = request_of(**settings)
    profile = pipeline.profile(request)
    state = advance(pipeline, start(pipeline, request), 3)
    assert tuple(state.latents.shape) == profile.latent_shape
    sampler = state.sampler
    memory = [t for t in (sampler.last_sample, sampler.velocity, *sampler.model_outputs) if t is not None]
    assert sum(t.nbytes for t in (state.latents, *memory)) == profile.state_bytes
    text = [t for t in (state.conditioning.positive, state.conditioning.negative) if t is not None]
    assert sum(t.nbytes for t in text) == profile.conditioning_bytes
    cursor, frames = None, []
    with torch.inference_mode():
        for _ in profile.chunk_frames:
            chunk, cursor = pipeline.decode(state, cursor)
            frames.append(len(chunk.frames))
            assert chunk.frames.nbytes <= profile.chunk_bytes
    assert cursor is None
    assert tuple(frames) == profile.chunk_frames


@torch.no_grad()
def test_the_costs_agree_with_counted_flop(pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]) -> None:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula: Callable[..., int] = sdpa_flop_count

    def attention_flop(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return formula(q, k, v)

    request = request_of(width=128, height=128, num_frames=9)
    profile = pipeline.profile(request)
    state = start(pipeline, request)
    _, cursor = pipeline.decode(state, None)
    _, cursor = pipeline.decode(state, cursor)
    for cost, work in (
        (profile.phases[0].step_cost, lambda: pipeline.step([state])),
        (profile.decode_chunk_cost, lambda: pipeline.decode(state, cursor)),
    ):
        with FlopCounterMode(display=False, custom_mapping={attention: attention_flop}) as counter:
            work()
        assert cost * 1e12 == pytest.approx(counter.get_total_flops(), rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def options() -> LoadOptions:
    return LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, ParallelMesh.single())


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage: links, so that it costs nothing."""
    for path in checkpoint.rglob("*"):
        target = tmp_path / "model" / path.relative_to(checkpoint)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "garbage", "truncated", "incomplete"])
def test_damaged_weights_are_named(copy: Path, name: str, damage: str) -> None:
    path = copy / name
    whole = path.read_bytes()
    tensors = load_file(path)
    path.unlink()
    if damage == "garbage":
        path.write_bytes(b"\xff" * 4096)
    elif damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "incomplete":
        decoded = next(key for key in tensors if not key.startswith("encoder.") or "block.0" in key)
        save_file({key: tensor for key, tensor in tensors.items() if key != decoded}, path)
    with pytest.raises(ModelError, match=name.split("/")[0]):
        load_pipeline(copy, options())


def test_another_text_encoder_or_vae_is_refused(copy: Path) -> None:
    for name, old, new in (
        ("text_encoder", '"model_type": "umt5"', '"model_type": "t5"'),
        ("vae", "AutoencoderKLWan", "AutoencoderKL"),
    ):
        path = copy / name / "config.json"
        text = path.read_text(encoding="utf-8")
        path.unlink()
        path.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ModelError, match="expected"):
            load_pipeline(copy, options())
        path.write_text(text, encoding="utf-8")


def test_ids_of_a_foreign_tokenizer_are_refused(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    request = msgspec.structs.replace(request_of(), token_ids={"prompt": (5, 400_000, 1), "negative": (1,)})
    with pytest.raises(ModelError, match="vocabulary"):
        start(pipeline, request)


@pytest.mark.parametrize(
    "ids", [{}, {"prompt": (1,)}, {"prompt": (), "negative": (1,)}, {"prompt": (5,) * 513, "negative": (1,)}]
)
def test_missing_or_too_many_ids_are_refused(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest], ids: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(InvalidRequest, match="1 to 512 ids expected"):
        start(pipeline, msgspec.structs.replace(request_of(), token_ids=ids))


def test_an_unknown_sampler_is_refused(pipeline: WanPipeline, request_of: Callable[..., GenerationRequest]) -> None:
    with pytest.raises(InvalidRequest, match="unipc"):
        start(pipeline, msgspec.structs.replace(request_of(), sampler="ddim"))


def test_weights_bytes_counts_every_resident_weight(pipeline: WanPipeline, checkpoint: Path) -> None:
    stored = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    assert 0.6 * stored < pipeline.weights_bytes() < stored  # the VAE's encoder is not loaded


def test_pipeline_and_frontend_compute_the_same_profile(
    pipeline: WanPipeline, request_of: Callable[..., GenerationRequest], checkpoint: Path
) -> None:
    spec = identify(checkpoint)
    params = SamplingParams(
        height=32, width=64, num_frames=5, num_inference_steps=4, guidance_scale=5.0, num_outputs_per_prompt=1
    ).merged_over(spec.defaults)
    assert FAMILIES["wan"].profile(spec, params) == pipeline.profile(request_of())
