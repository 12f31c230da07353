"""The Z-Image pipeline against diffusers' ZImagePipeline, and the promises that the executor relies on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rank_processes import module
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.configs.families import FAMILIES, identify
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import InvalidRequest, JobFailed, ModelError
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.zimage.pipeline import ZImagePipeline
from safelight.runtime.models.zimage.transformer import ZImageText
from safelight.runtime.models.zimage.weights import load_transformer
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState
from safelight.runtime.samplers import make_sampler

SCRIPTS = Path(__file__).parents[2] / "scripts"
PROGRAM = module(SCRIPTS / "parity_table.py")
TABLE = PROGRAM.family("zimage")
Case, LONG = TABLE.Case, TABLE.LONG


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("zimage")
    module(SCRIPTS / "make_checkpoint.py").make("z-image", folder)
    return folder


@pytest.fixture(scope="module")
def parity(checkpoint: Path) -> Any:
    return TABLE.Parity(checkpoint)


@pytest.fixture(scope="module")
def pipeline(parity: Any) -> ZImagePipeline:
    assert isinstance(parity.ours, ZImagePipeline)
    return parity.ours


@pytest.fixture
def request_of(parity: Any) -> Callable[..., GenerationRequest]:
    return lambda **settings: parity.request(Case("", **settings))


def options() -> LoadOptions:
    return LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, ParallelMesh.single())


@torch.inference_mode()
def start(pipeline: ZImagePipeline, request: GenerationRequest, index: int = 0) -> DenoiseState:
    return pipeline.prepare(request, pipeline.encode(request), index)


@torch.inference_mode()
def advance(pipeline: ZImagePipeline, state: DenoiseState, steps: int | None = None) -> DenoiseState:
    for _ in range(state.request.num_inference_steps - state.step if steps is None else steps):
        (state,) = pipeline.step([state])
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Parity


@pytest.mark.parametrize("case", TABLE.CASES, ids=lambda case: case.name)
def test_latents_and_pictures_match_diffusers(parity: Any, case: Any) -> None:
    ours = parity.run_ours(case)
    assert ours[1].shape == (case.outputs, 1, case.height, case.width, 3)
    latents, levels = PROGRAM.errors(ours, parity.run_reference(case))
    assert latents <= PROGRAM.TOLERANCE
    assert levels <= 1


@pytest.fixture(scope="module")
def expected(parity: Any) -> Any:
    return parity.run_reference(TABLE.CASES[0])


@pytest.mark.parametrize("control", TABLE.CONTROLS, ids=lambda control: control.name)
def test_something_wrong_is_far_outside_the_tolerance(parity: Any, expected: Any, control: Any) -> None:
    latents, _ = PROGRAM.errors(parity.run_ours(control.case or TABLE.CASES[0], control.spoil(parity.ours)), expected)
    assert latents > PROGRAM.CONTROL_FACTOR * PROGRAM.TOLERANCE


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "a red  cat\n\n",
        "<|im_end|>\n<|im_start|>assistant\nno",
        "<think></think>",
        "猫と犬 🎨 é e\u0301",
        "x" * 3000,
    ],
    ids=range(7),
)
def test_token_ids_equal_the_reference_s(parity: Any, prompt: str) -> None:
    tokenizer = parity.theirs.tokenizer
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    expected = tokenizer(text, max_length=512, truncation=True).input_ids
    assert parity.tokenizer.encode_request(prompt, "a")["prompt"] == tuple(expected)


def test_schedules_have_the_reference_s_bits(parity: Any, pipeline: ZImagePipeline) -> None:
    """The time embedding reads a thousandfold of the timestep, so an ulp of it shows in the prediction."""
    from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

    for steps in (1, 3, 8, 9, 50):
        parity.theirs.scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps))
        schedule = make_sampler("euler", pipeline.flow).schedule(steps, 1024)
        assert torch.equal(schedule.sigmas, parity.theirs.scheduler.sigmas)
        assert torch.equal(torch.tensor(schedule.timesteps), parity.theirs.scheduler.timesteps)


def test_the_unconditional_branch_is_encoded_only_when_guided(
    pipeline: ZImagePipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    with torch.inference_mode():
        guided, unguided = pipeline.encode(request_of(prompt=LONG)), pipeline.encode(request_of(guidance=0.0))
    assert unguided.negative is None
    assert guided.negative is not None
    assert guided.negative.shape == (32, 64)
    length = len(request_of(prompt=LONG).token_ids["prompt"])
    assert guided.positive.shape == (-(-length // 32) * 32, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Batches, purity, checkpoints


def test_a_batch_of_requests_of_different_lengths_equals_runs_of_one(
    pipeline: ZImagePipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    """Other prompts, seeds, guidance, step counts, caption lengths, and the first is two steps ahead."""
    settings: list[dict[str, Any]] = [
        {"prompt": "a cat", "steps": 5, "seed": 1},
        {"prompt": LONG, "negative": LONG * 2, "guidance": 2.5, "steps": 3, "seed": 2},
        {"prompt": LONG[:-2], "guidance": 1.5, "steps": 4, "seed": 3},
    ]
    states = [start(pipeline, request_of(**each)) for each in settings]
    assert len({len(s.conditioning.positive) for s in states}) > 1
    states[0] = advance(pipeline, states[0], 2)
    alone = [advance(pipeline, state, 3) for state in states]
    with torch.inference_mode():
        for _ in range(3):
            states = pipeline.step(states)
    for batched, single in zip(states, alone, strict=True):
        assert batched.step == single.step
        assert (batched.latents - single.latents).abs().max() <= 1e-5


def tensors_of(state: DenoiseState) -> list[torch.Tensor]:
    text = [t for t in (state.conditioning.positive, state.conditioning.negative) if t is not None]
    return [state.latents, state.sigmas, state.rng_state, *text]


def test_a_step_changes_nothing_that_it_was_given(
    pipeline: ZImagePipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    states = [start(pipeline, request_of(seed=seed)) for seed in (1, 2)]
    before = [tensor.clone() for state in states for tensor in tensors_of(state)]
    with torch.inference_mode():
        pipeline.step(states)
    assert all(
        torch.equal(old, now) for old, now in zip(before, [t for s in states for t in tensors_of(s)], strict=True)
    )
    assert [state.step for state in states] == [0, 0]


def test_resuming_after_every_step_gives_the_same_bits(
    pipeline: ZImagePipeline, request_of: Callable[..., GenerationRequest], tmp_path: Path
) -> None:
    request = request_of(steps=4)
    state, whole = start(pipeline, request), advance(pipeline, start(pipeline, request))
    for step in range(4):
        save_file(pipeline.save(state), tmp_path / f"{step}.safetensors")
        with torch.inference_mode():
            resumed = pipeline.load(request, pipeline.encode(request), load_file(tmp_path / f"{step}.safetensors"))
        assert resumed.step == step
        assert torch.equal(advance(pipeline, resumed).latents, whole.latents)
        state = advance(pipeline, state, 1)
    with pytest.raises(JobFailed, match="another request"):
        pipeline.load(request_of(width=80), state.conditioning, pipeline.save(state))


def test_a_step_never_reads_a_value_back_from_the_device(
    pipeline: ZImagePipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    """`.item()`, `bool(tensor)` and data-dependent shapes all go through these operators."""
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"}
    seen: set[str] = set()

    class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    state = start(pipeline, request_of(steps=2, prompt=LONG))
    mode: Any = Record
    with mode(), torch.inference_mode(False), torch.no_grad():  # inference mode hides what composites are made of
        pipeline.step([state])
    assert "addmm" in seen
    assert not seen & waiting


def test_compiled_blocks_have_no_branch_on_values_and_share_a_graph_over_lengths(
    pipeline: ZImagePipeline, checkpoint: Path
) -> None:
    """As `compile_blocks` does it, with a backend that only counts: one graph for the first length, one for others."""
    from torch._dynamo.testing import CompileCounter

    counter: Any = CompileCounter()
    compiled = load_transformer(checkpoint / "transformer", options())
    compiled.blocks[0].compile(fullgraph=True, backend=counter)
    latents, time = torch.randn(1, 16, 1, 6, 8), torch.tensor([0.5])
    frames = []
    with torch.inference_mode():
        for length in (20, 40, 100):
            text = torch.randn(1, length, 32)
            expected = pipeline.transformer(latents, time, ZImageText(pipeline.transformer.caption(text)))
            made = compiled(latents, time, ZImageText(compiled.caption(text)))
            assert torch.equal(made, expected)
            frames.append(counter.frame_count)
    assert frames == [1, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# The profile tells the truth


@pytest.mark.parametrize("settings", [{}, {"guidance": 0.0, "width": 80}])
def test_the_profile_describes_what_the_pipeline_holds(
    pipeline: ZImagePipeline, request_of: Callable[..., GenerationRequest], settings: dict[str, Any]
) -> None:
    """Captions are counted with the most tokens that a prompt may have."""
    request = request_of(**settings, prompt=LONG * 8, negative=LONG * 8)
    profile = pipeline.profile(request)
    state = advance(pipeline, start(pipeline, request), 2)
    assert tuple(state.latents.shape) == profile.latent_shape
    assert state.latents.nbytes == profile.state_bytes
    text = [t for t in (state.conditioning.positive, state.conditioning.negative) if t is not None]
    assert sum(t.nbytes for t in text) == profile.conditioning_bytes
    assert profile.phases[0].batch_key.guided == (len(text) == 2)
    with torch.inference_mode():
        chunk, cursor = pipeline.decode(state, None)
    assert cursor is None
    assert profile.chunk_frames == (len(chunk.frames),)
    assert chunk.frames.nbytes == profile.chunk_bytes


@torch.no_grad()
def test_the_costs_agree_with_counted_flop(
    pipeline: ZImagePipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula: Callable[..., int] = sdpa_flop_count

    def attention_flop(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return formula(q, k, v)

    request = request_of(width=128, height=96)
    profile = pipeline.profile(request)
    state = start(pipeline, request)
    for cost, work in (
        (profile.encode_cost, lambda: pipeline.encode(request)),
        (profile.phases[0].step_cost, lambda: pipeline.step([state])),
        (profile.decode_chunk_cost, lambda: pipeline.decode(state, None)),
    ):
        with FlopCounterMode(display=False, custom_mapping={attention: attention_flop}) as counter:
            work()
        assert cost * 1e12 == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_pipeline_and_frontend_compute_the_same_profile(
    pipeline: ZImagePipeline, request_of: Callable[..., GenerationRequest], checkpoint: Path
) -> None:
    spec, case = identify(checkpoint), TABLE.CASES[0]
    params = SamplingParams(
        prompt=case.prompt, negative_prompt=case.negative, height=48, width=64, num_inference_steps=3,
        guidance_scale=4.0,
    ).merged_over(spec.defaults)  # fmt: skip
    assert FAMILIES["zimage"].profile(spec, params) == pipeline.profile(request_of())


# ---------------------------------------------------------------------------------------------------------------------
# Loading and refusing


def test_an_encoder_saved_with_its_language_head_gives_the_same_states(
    checkpoint: Path, pipeline: ZImagePipeline, tmp_path: Path
) -> None:
    from safelight.runtime.models.encoders.qwen3 import load_qwen3

    tensors = load_file(checkpoint / "text_encoder" / "model.safetensors")
    renamed = {f"model.{name}": tensor for name, tensor in tensors.items()} | {"lm_head.weight": torch.zeros(4, 4)}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "text_encoder" / "config.json").read_bytes())
    other = load_qwen3(tmp_path, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        assert torch.equal(other.encode([(5, 9, 300)])[0], pipeline.text_encoder.encode([(5, 9, 300)])[0])
    del renamed["model.layers.0.mlp.up_proj.weight"]
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing.*layers\.0\.mlp\.up_proj"):
        load_qwen3(tmp_path, torch.device("cpu"), torch.float32)


def test_missing_or_foreign_ids_are_refused(
    pipeline: ZImagePipeline, request_of: Callable[..., GenerationRequest]
) -> None:
    for ids in ({}, {"prompt": (1,)}, {"prompt": (), "negative": (1,)}, {"prompt": (5,) * 513, "negative": (1,)}):
        with pytest.raises(InvalidRequest, match="1 to 512 ids expected"):
            start(pipeline, msgspec.structs.replace(request_of(), token_ids=ids))
    with pytest.raises(ModelError, match="vocabulary"):
        start(pipeline, msgspec.structs.replace(request_of(), token_ids={"prompt": (5, 400_000), "negative": (1,)}))


def test_every_resident_weight_is_counted(pipeline: ZImagePipeline, checkpoint: Path) -> None:
    stored = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    assert 0.6 * stored < pipeline.weights_bytes() < stored  # not the VAE's encoder, not the encoder's last layer
