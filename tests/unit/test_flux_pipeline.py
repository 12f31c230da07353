"""The FLUX.1 pipeline against diffusers' FluxPipeline, and the promises that the executor relies on."""

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
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.configs.families import FAMILIES, identify
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import InvalidRequest, JobFailed, ModelError
from safelight.runtime.layers.linear import Adapter
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.flux.pipeline import FluxPipeline
from safelight.runtime.models.flux.transformer import FluxConfig, FluxText
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.models.vae.tiles import KL_BAND_ROWS
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState, Pipeline

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


TABLE = script("parity_table").family("flux")
Case = TABLE.Case


def made(name: str, factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = factory.mktemp(name)
    script("make_checkpoint").make(name, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("flux1-dev", tmp_path_factory)


@pytest.fixture(scope="module")
def parity(checkpoint: Path) -> Any:
    return TABLE.Parity(checkpoint)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TABLE.Parity(made("flux1-schnell", tmp_path_factory))


@pytest.fixture(scope="module")
def pipeline(parity: Any) -> FluxPipeline:
    assert isinstance(parity.ours, FluxPipeline)
    return parity.ours


@pytest.fixture
def request_of(parity: Any) -> Callable[..., GenerationRequest]:
    def make(**settings: Any) -> GenerationRequest:
        small: dict[str, Any] = {"width": 48, "height": 32, "steps": 4}
        request: GenerationRequest = parity.request(Case("", **(small | settings)))
        return request

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
    text = [t for prompt in state.conditioning.branches for t in (prompt.words, prompt.gist)]
    return [state.latents, state.sigmas, state.rng_state, *text]


# ---------------------------------------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize("case", TABLE.CASES, ids=lambda case: case.name)
def test_latents_and_pictures_match_diffusers(parity: Any, case: Any) -> None:
    ours = parity.run_ours(case)
    assert ours[1].shape == (case.outputs, 1, case.height, case.width, 3)
    latents, levels = TABLE.errors(ours, parity.run_reference(case))
    assert latents <= TABLE.TOLERANCE
    assert levels <= 1


@pytest.mark.parametrize("case", TABLE.SCHNELL_CASES, ids=lambda case: case.name)
def test_schnell_matches_diffusers(schnell: Any, case: Any) -> None:
    ours = schnell.run_ours(case)
    latents, levels = TABLE.errors(ours, schnell.run_reference(case))
    assert latents <= TABLE.TOLERANCE
    assert levels <= 1


@pytest.mark.parametrize("control", TABLE.CONTROLS, ids=lambda control: control.name)
def test_something_wrong_is_far_outside_the_tolerance(parity: Any, control: Any) -> None:
    ours = parity.run_ours(control.case or TABLE.CASES[0], control.spoil(parity.ours))
    latents, _ = TABLE.errors(ours, parity.run_reference(TABLE.CASES[0]))
    assert latents > TABLE.CONTROL_FACTOR * TABLE.TOLERANCE


def test_the_negative_prompt_is_encoded_only_for_true_guidance(
    pipeline: FluxPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    with torch.inference_mode():
        plain, guided = (pipeline.encode(request_of(true_cfg=scale)) for scale in (1.0, 2.0))
    assert (len(plain.branches), len(guided.branches)) == (1, 2)
    assert guided.branches[0].words.shape == (512, 32)
    assert torch.equal(plain.branches[0].words, guided.branches[0].words)


# ---------------------------------------------------------------------------------------------------------------------
# Batches, purity, checkpoints


@pytest.mark.parametrize("true_cfg", [1.0, 2.0])
def test_a_batch_of_different_requests_equals_runs_of_one(
    pipeline: FluxPipeline, request_of: Callable[..., GenerationRequest], true_cfg: float
) -> None:
    """Other prompts, seeds, guidance and step counts, and the first is two steps ahead."""
    first = start(pipeline, request_of(prompt="a cat", guidance=5.0, steps=6, seed=1, true_cfg=true_cfg))
    other: dict[str, Any] = {"steps": 4, "true_cfg": 1.5 * true_cfg if true_cfg > 1 else 1.0}
    rest = [start(pipeline, request_of(prompt=f"blue dogs {n}", guidance=1.0 + n, seed=n, **other)) for n in (2, 3)]
    first = advance(pipeline, first, 2)
    alone = [advance(pipeline, state) for state in (first, *rest)]
    states = [first, *rest]
    with torch.inference_mode():
        for _ in range(4):
            states = pipeline.step(states)
    for batched, single in zip(states, alone, strict=True):
        assert batched.step == single.step == batched.request.num_inference_steps
        assert (batched.latents - single.latents).abs().max() <= 5e-5  # about 30 in size
    assert (alone[1].latents - alone[2].latents).abs().max() > 1


def test_a_step_changes_nothing_that_it_was_given(
    pipeline: FluxPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    state = advance(pipeline, start(pipeline, request_of()), 2)
    before = [t.clone() for t in tensors_of(state)]
    first, again = advance(pipeline, state, 1), advance(pipeline, state, 1)
    assert torch.equal(first.latents, again.latents)
    assert state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))


@pytest.mark.parametrize("true_cfg", [1.0, 2.0])
def test_saving_and_loading_after_any_step_changes_no_bit(
    pipeline: FluxPipeline, request_of: Callable[..., GenerationRequest], tmp_path: Path, true_cfg: float
) -> None:
    request = request_of(true_cfg=true_cfg)
    whole = advance(pipeline, start(pipeline, request, 1))
    for k in range(5):
        save_file(pipeline.save(advance(pipeline, start(pipeline, request, 1), k)), tmp_path / f"{k}.safetensors")
        with torch.inference_mode():
            conditioning = pipeline.encode(request)
        resumed = pipeline.load(request, conditioning, load_file(tmp_path / f"{k}.safetensors"))
        assert (resumed.step, resumed.index) == (k, 1)
        assert torch.equal(advance(pipeline, resumed).latents, whole.latents), k
    with pytest.raises(JobFailed, match="another request"):
        pipeline.load(request_of(steps=5), conditioning, pipeline.save(whole))


def test_a_step_never_reads_a_value_back_from_the_device(
    pipeline: FluxPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    """`.item()`, `bool(tensor)` and data-dependent shapes all go through these operators."""
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"}
    seen: set[str] = set()

    class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    state = start(pipeline, request_of(true_cfg=2.0))
    mode: Any = Record
    with mode(), torch.inference_mode(False), torch.no_grad():  # inference mode hides what composites are made of
        pipeline.step(pipeline.step([state]))
    assert "addmm" in seen
    assert not seen & waiting


def test_blocks_can_be_compiled_whole(pipeline: FluxPipeline) -> None:
    """No graph breaks: the backend only records, so nothing is compiled here."""
    torch._dynamo.reset()
    model = pipeline.transformer
    latents, text = torch.randn(1, 16, 1, 4, 6), FluxText(torch.randn(1, 8, 32), torch.randn(1, 24), torch.ones(1))
    with torch.inference_mode():
        expected = model(latents, torch.tensor([500.0]), text)
    blocks = [*model.double_blocks, *model.single_blocks]
    try:
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False, backend="eager")
        with torch.inference_mode():
            assert torch.equal(model(latents, torch.tensor([500.0]), text), expected)
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()


def test_adapters_change_the_layer_that_they_name(pipeline: FluxPipeline) -> None:
    model, width = pipeline.transformer, pipeline.transformer.config.width
    latents, text = torch.randn(1, 16, 1, 4, 6), FluxText(torch.randn(1, 8, 32), torch.randn(1, 24), torch.ones(1))
    adapter = Adapter(torch.randn(2, width) * 0.1, torch.randn(7 * width, 2), 0.5)
    with torch.inference_mode():
        plain = model(latents, torch.tensor([500.0]), text)
        adapted = model(latents, torch.tensor([500.0]), text, adapters={"single_blocks.1.up": (adapter,)})
        layer: Any = model.single_blocks[1].up
        layer.weight += adapter.up @ adapter.down * adapter.scale
        merged = model(latents, torch.tensor([500.0]), text)
        layer.weight -= adapter.up @ adapter.down * adapter.scale
    assert (adapted - plain).abs().max() > 0.01
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The profile tells the truth


@pytest.mark.parametrize("settings", [{}, {"true_cfg": 2.0, "width": 80}])
def test_the_profile_describes_what_the_pipeline_holds(
    pipeline: FluxPipeline, request_of: Callable[..., GenerationRequest], settings: dict[str, Any]
) -> None:
    request = request_of(**settings)
    profile = pipeline.profile(request)
    state = advance(pipeline, start(pipeline, request), 1)
    assert tuple(state.latents.shape) == profile.latent_shape
    assert state.latents.nbytes == profile.state_bytes
    assert sum(t.nbytes for t in tensors_of(state)[3:]) == profile.conditioning_bytes
    with torch.inference_mode():
        chunk, cursor = pipeline.decode(state, None)
    assert cursor is None
    assert (len(chunk.frames),) == profile.chunk_frames
    assert chunk.frames.nbytes == profile.chunk_bytes


@torch.no_grad()
def test_the_costs_agree_with_counted_flop(
    pipeline: FluxPipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula: Callable[..., int] = sdpa_flop_count

    def attention_flop(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return formula(q, k, v)

    request = request_of(width=256, height=192, true_cfg=2.0)
    profile, state = pipeline.profile(request), start(pipeline, request)
    for cost, work in (
        (profile.encode_cost, lambda: pipeline.encode(request)),
        (profile.phases[0].step_cost, lambda: pipeline.step([state])),
        (profile.decode_chunk_cost, lambda: pipeline.decode(state, None)),
    ):
        with FlopCounterMode(display=False, custom_mapping={attention: attention_flop}) as counter:
            work()
        assert cost * 1e12 == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_pipeline_and_frontend_compute_the_same_profile(
    pipeline: FluxPipeline, request_of: Callable[..., GenerationRequest], checkpoint: Path
) -> None:
    spec = identify(checkpoint)
    given = SamplingParams(height=32, width=48, num_inference_steps=4, true_cfg_scale=2.0, num_outputs_per_prompt=1)
    assert FAMILIES["flux"].profile(spec, given.merged_over(spec.defaults)) == pipeline.profile(
        request_of(true_cfg=2.0)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def options(**changes: Any) -> LoadOptions:
    return replace(
        LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, ParallelMesh.single()), **changes
    )


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage: links, so that it costs nothing."""
    for path in checkpoint.rglob("*"):
        target = tmp_path / "model" / path.relative_to(checkpoint)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "vae", "transformer"])
@pytest.mark.parametrize("damage", ["missing", "garbage", "incomplete"])
def test_damaged_weights_are_named(copy: Path, name: str, damage: str) -> None:
    (path,) = (copy / name).glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    if damage == "garbage":
        path.write_bytes(b"\xff" * 4096)
    elif damage == "incomplete":
        lost = next(
            key for key in tensors if ("block" in key and not key.startswith("encoder.down")) or "layers" in key
        )
        save_file({key: tensor for key, tensor in tensors.items() if key != lost}, path)
    with pytest.raises(ModelError, match=name):
        load_pipeline(copy, options())


def test_components_of_another_kind_are_refused(copy: Path) -> None:
    for name, old, new, message in (
        ("text_encoder", '"model_type": "clip_text_model"', '"model_type": "t5"', "clip_text_model expected"),
        ("text_encoder_2", '"feed_forward_proj": "gated-gelu"', '"feed_forward_proj": "relu"', "gated-gelu expected"),
        ("vae", '"AutoencoderKL"', '"AutoencoderKLWan"', "AutoencoderKL without"),
        ("transformer", '"patch_size": 1', '"patch_size": 2', "patch_size 1"),
    ):
        path = copy / name / "config.json"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.unlink()
        path.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ModelError, match=message):
            load_pipeline(copy, options())
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("key", ["prompt", "clip.prompt", "negative", "clip.negative"])
@pytest.mark.parametrize("ids", [(), (5,) * 513, (400_000, 1)])
def test_ids_that_are_missing_too_many_or_foreign_are_refused(
    pipeline: FluxPipeline, request_of: Callable[..., GenerationRequest], key: str, ids: tuple[int, ...]
) -> None:
    request = request_of(true_cfg=2.0)
    with pytest.raises((InvalidRequest, ModelError), match=r"ids expected|vocabulary"):
        start(pipeline, msgspec.structs.replace(request, token_ids=request.token_ids | {key: ids}))


def test_tiling_decodes_the_same_picture_in_bands(
    pipeline: FluxPipeline, request_of: Callable[..., GenerationRequest], checkpoint: Path
) -> None:
    tiled: Any = load_pipeline(checkpoint, options(vae_tiling=True))
    assert tiled.vae.band_rows == KL_BAND_ROWS
    state = start(pipeline, request_of(width=48, height=192))
    with torch.inference_mode():
        frames, whole = (each.decode(state, None)[0].frames.int() for each in (tiled, pipeline))
    assert (frames - whole).abs().max() <= 1


def test_weights_bytes_counts_every_resident_weight(pipeline: FluxPipeline, checkpoint: Path) -> None:
    stored = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    assert 0.6 * stored < pipeline.weights_bytes() - pipeline.ahead.room < stored  # the VAE's encoder is not loaded


def test_an_incomplete_or_contradictory_config_is_named() -> None:
    with pytest.raises(ModelError, match="incomplete"):
        FluxConfig.from_json({"num_layers": 2})
    whole = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 64, "num_layers": 1, "num_single_layers": 1,
        "joint_attention_dim": 8, "pooled_projection_dim": 8,
    }  # fmt: skip
    with pytest.raises(ModelError, match="add up to attention_head_dim 16"):
        FluxConfig.from_json(whole)
