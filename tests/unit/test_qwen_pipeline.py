"""The Qwen-Image pipelines against diffusers', and the promises that the executor relies on."""

from __future__ import annotations

import importlib.util
import json
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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.configs.families.qwen_costs import forward_flop
from safelight.runtime.errors import InvalidRequest, JobFailed, ModelError
from safelight.runtime.messages import GenerationRequest, InputImage
from safelight.runtime.models.encoders import qwen2_5_vl
from safelight.runtime.models.qwen.pipeline import QwenPipeline
from safelight.runtime.models.qwen.transformer import QwenInputs
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState

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


CREATE, EDIT = (script("parity_table").family(name) for name in ("qwen", "qwen_edit"))
Case = CREATE.Case


class Checkpoints:
    """Tiny checkpoints and both pipelines on them, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, {}  # type: ignore[var-annotated]

    def root(self, name: str) -> Path:
        if not (self.folder / name).exists():
            script("make_checkpoint").make(name, self.folder / name)
        return self.folder / name

    def __getitem__(self, name: str) -> Any:
        if name not in self.made:
            self.made[name] = CREATE.Parity(self.root(name))
        return self.made[name]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    torch.set_num_threads(1)
    return Checkpoints(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def parity(checkpoints: Checkpoints) -> Any:
    return checkpoints["qwen-image"]


@pytest.fixture(scope="module")
def edits(checkpoints: Checkpoints) -> Any:
    return checkpoints["qwen-image-edit-plus"]


@torch.inference_mode()
def start(both: Any, index: int = 0, **settings: Any) -> DenoiseState:
    request = both.request(Case("", **settings))
    state: DenoiseState = both.ours.prepare(request, both.ours.encode(request), index)
    return state


@torch.inference_mode()
def advance(pipeline: QwenPipeline, state: DenoiseState, steps: int | None = None) -> DenoiseState:
    for _ in range(state.request.num_inference_steps - state.step if steps is None else steps):
        (state,) = pipeline.step([state])
    return state


def tensors_of(state: DenoiseState) -> list[Tensor]:
    conditioning = state.conditioning
    text = [t for t in (conditioning.positive, conditioning.negative) if t is not None]
    return [state.latents, state.sigmas, state.rng_state, *text, *conditioning.references]


# ---------------------------------------------------------------------------------------------------------------------
# Parity


def check(both: Any, case: Any) -> None:
    ours = both.run_ours(case)
    assert ours[1].shape == (case.outputs, 1, case.height, case.width, 3)
    latents, levels = CREATE.errors(ours, both.run_reference(case))
    assert latents <= CREATE.TOLERANCE
    assert levels <= 1


@pytest.mark.parametrize("case", CREATE.CASES, ids=lambda case: case.name)
def test_latents_and_pictures_match_diffusers(parity: Any, case: Any) -> None:
    check(parity, case)


@pytest.mark.parametrize("case", EDIT.CASES, ids=lambda case: case.name)
def test_edits_match_diffusers(edits: Any, case: Any) -> None:
    check(edits, case)


@pytest.mark.parametrize("name", ["qwen-image-edit", "qwen-image-edit-2511"])
def test_edits_of_the_other_variants_match_diffusers(checkpoints: Checkpoints, name: str) -> None:
    pictures = 1 if name == "qwen-image-edit" else 3
    check(checkpoints[name], Case("", width=48, height=80, pictures=pictures, prompt="make it red, please"))


@pytest.mark.parametrize("control", CREATE.CONTROLS, ids=lambda control: control.name)
def test_something_wrong_is_far_outside_the_tolerance(parity: Any, control: Any) -> None:
    case = control.case or CREATE.CASES[0]
    latents, _ = CREATE.errors(parity.run_ours(case, control.spoil(parity.ours)), reference_of(parity, CREATE.CASES[0]))
    assert latents > CREATE.CONTROL_FACTOR * CREATE.TOLERANCE


@pytest.mark.parametrize("control", EDIT.CONTROLS, ids=lambda control: control.name)
def test_something_wrong_in_an_edit_is_far_outside_the_tolerance(edits: Any, control: Any) -> None:
    case = control.case or EDIT.CASES[0]
    latents, _ = EDIT.errors(edits.run_ours(case, control.spoil(edits.ours)), reference_of(edits, EDIT.CASES[0]))
    assert latents > EDIT.CONTROL_FACTOR * EDIT.TOLERANCE


def reference_of(both: Any, case: Any) -> Any:
    """The reference's run, once for all controls."""
    if not hasattr(both, "kept"):
        both.kept = both.run_reference(case)
    return both.kept


def test_image_tokens_at_the_positions_of_text_show(edits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers' pipeline itself gives with transformers 5, unless the encoder is told which tokens are images."""
    monkeypatch.setattr(qwen2_5_vl, "token_positions", lambda ids, *_: [list(range(len(ids)))] * 3)
    latents, _ = EDIT.errors(edits.run_ours(EDIT.CASES[0]), reference_of(edits, EDIT.CASES[0]))
    assert latents > EDIT.CONTROL_FACTOR * EDIT.TOLERANCE


def test_pictures_modulated_as_the_result_show_in_a_2511(checkpoints: Checkpoints) -> None:
    both = checkpoints["qwen-image-edit-2511"]
    case = EDIT.CASES[0]
    right, model = both.run_ours(case), both.ours.transformer
    assert model.config.zero_cond_t
    try:
        model.config = replace(model.config, zero_cond_t=False)
        wrong = both.run_ours(case)
    finally:
        model.config = replace(model.config, zero_cond_t=True)
    assert (wrong[0] - right[0]).abs().max() > EDIT.CONTROL_FACTOR * EDIT.TOLERANCE


def test_one_step_gives_a_picture_where_the_reference_divides_by_zero(parity: Any) -> None:
    latents, _ = parity.run_ours(Case("", steps=1))
    assert torch.isfinite(latents).all()


def test_noise_equals_a_list_of_generators_and_depends_on_seed_plus_index(parity: Any) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    ours = torch.cat([start(parity, index, seed=11, outputs=3).latents for index in range(3)], dim=1)
    generators = [torch.Generator().manual_seed(11 + index) for index in range(3)]
    theirs = randn_tensor((3, 1, 4, 6, 8), generator=generators, dtype=torch.float32)
    assert torch.equal(ours.transpose(0, 1), theirs[:, 0])


def test_the_vae_gives_the_pictures_of_its_own_class(edits: Any) -> None:
    theirs = edits.theirs.vae
    mean, std = (torch.tensor(theirs.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    with torch.inference_mode():
        pixels = torch.randn(1, 3, 1, 48, 80).clamp(-1, 1)
        expected = (theirs.encode(pixels).latent_dist.mode() - mean) / std
        latents = edits.ours.vae.encode(pixels[0])
        assert (latents - expected[0]).abs().max() <= 1e-6
        unit = theirs.decode(latents[None] / (1 / std) + mean, return_dict=False)[0][0, :, 0] / 2 + 0.5
        frames, cursor = edits.ours.vae.decode(latents, None)
        in_bands, _ = replace(edits.ours.vae, band_rows=2).decode(latents, None)
    assert cursor is None
    assert torch.equal(frames[0], (unit.clamp(0, 1).permute(1, 2, 0) * 255).round().to(torch.uint8))
    assert (in_bands.int() - frames.int()).abs().max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Batches, purity, checkpoints


class Counting:
    """A transformer, and the samples of each of its forwards."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.samples = inner, []  # type: ignore[var-annotated]

    def __call__(self, latents: Tensor, timestep: Tensor, inputs: QwenInputs) -> Any:
        self.samples.append(len(latents))
        return self.inner(latents, timestep, inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_a_batch_of_prompts_of_different_lengths_equals_runs_of_one(parity: Any) -> None:
    """Other prompts, seeds, guidance and step counts, and the first is three steps ahead."""
    settings: list[dict[str, Any]] = [
        {"prompt": "a cat", "scale": 5.0, "steps": 7, "seed": 1, "negative": "dog"},
        {"prompt": "the blue dog, and many more words of it", "scale": 2.5, "steps": 4, "seed": 2, "negative": ""},
        {"prompt": "a dog", "scale": 3.0, "steps": 4, "seed": 3, "negative": "cat"},
    ]
    states = [start(parity, **each) for each in settings]
    states[0] = advance(parity.ours, states[0], 3)
    alone = [advance(parity.ours, state) for state in states]
    counting: Any = Counting(parity.ours.transformer)
    pipeline = replace(parity.ours, transformer=counting)
    with torch.inference_mode():
        for _ in range(4):
            states = pipeline.step(states)
    for batched, single in zip(states, alone, strict=True):
        assert batched.step == single.step == batched.request.num_inference_steps
        assert (batched.latents - single.latents).abs().max() <= 1e-5
    lengths = [len(t) for s in states for t in (s.conditioning.positive, s.conditioning.negative)]
    assert sorted(counting.samples[:4], reverse=True) == sorted((lengths.count(n) for n in {*lengths}), reverse=True)


def test_a_batch_of_edits_with_different_pictures_equals_runs_of_one(edits: Any) -> None:
    states = [start(edits, pictures=n, prompt=p, steps=2) for n, p in ((1, "red"), (3, "make it blue"), (1, "dog"))]
    alone = [advance(edits.ours, state) for state in states]
    with torch.inference_mode():
        for _ in range(2):
            states = edits.ours.step(states)
    for batched, single in zip(states, alone, strict=True):
        assert (batched.latents - single.latents).abs().max() <= 1e-5


def test_outputs_of_one_prompt_share_each_forward(parity: Any) -> None:
    counting: Any = Counting(parity.ours.transformer)
    states = [start(parity, index, outputs=3) for index in range(3)]
    with torch.inference_mode():
        replace(parity.ours, transformer=counting).step(states)
    assert counting.samples == [3, 3]


def test_a_step_changes_nothing_that_it_was_given(edits: Any) -> None:
    state = advance(edits.ours, start(edits, pictures=1), 1)
    before = [t.clone() for t in tensors_of(state)]
    first, again = advance(edits.ours, state, 1), advance(edits.ours, state, 1)
    assert torch.equal(first.latents, again.latents)
    assert state.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))


def test_a_failed_step_leaves_its_states_usable(parity: Any) -> None:
    class Failing(Counting):
        def __call__(self, *_: Any) -> Tensor:
            raise RuntimeError("out of memory")

    state = advance(parity.ours, start(parity), 1)
    broken: Any = replace(parity.ours, transformer=Failing(parity.ours.transformer))
    with pytest.raises(RuntimeError, match="out of memory"):
        advance(broken, state, 1)
    assert torch.equal(advance(parity.ours, state).latents, advance(parity.ours, start(parity)).latents)


@pytest.mark.parametrize(("pictures", "scale"), [(0, 4.0), (0, 1.0), (2, 4.0)])
def test_saving_and_loading_after_any_step_changes_no_bit(
    parity: Any, edits: Any, tmp_path: Path, pictures: int, scale: float
) -> None:
    both = edits if pictures else parity
    settings: dict[str, Any] = {"pictures": pictures, "scale": scale, "steps": 4, "outputs": 2}
    whole = advance(both.ours, start(both, 1, **settings))
    for k in range(5):
        path = tmp_path / f"{k}.safetensors"
        save_file(both.ours.save(advance(both.ours, start(both, 1, **settings), k)), path)
        with torch.inference_mode():
            conditioning = both.ours.encode(whole.request)
        resumed = both.ours.load(whole.request, conditioning, load_file(path))
        assert (resumed.step, resumed.index, resumed.guidance_scale) == (k, 1, scale)
        assert torch.equal(advance(both.ours, resumed).latents, whole.latents), k


def test_a_checkpoint_of_another_request_is_refused(parity: Any) -> None:
    state = advance(parity.ours, start(parity), 2)
    saved = parity.ours.save(state)
    for other in (start(parity, steps=5), start(parity, width=80)):
        with pytest.raises(JobFailed, match="another request"):
            parity.ours.load(other.request, state.conditioning, saved)


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_step_never_reads_a_value_back_from_the_device(parity: Any, edits: Any, pictures: int) -> None:
    """`.item()`, `bool(tensor)` and data-dependent shapes all go through these operators."""
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"}
    seen: set[str] = set()

    class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    both = edits if pictures else parity
    state, mode = start(both, pictures=pictures), Record
    with mode(), torch.inference_mode(False), torch.no_grad():  # type: ignore[no-untyped-call]
        for _ in range(3):
            (state,) = both.ours.step([state])
    assert "addmm" in seen
    assert not seen & waiting


def test_weights_in_host_memory_give_the_same_bits(checkpoints: Checkpoints, edits: Any) -> None:
    cpu, case = torch.device("cpu"), Case("", pictures=1, steps=2)
    moved = ("text_encoder", "vae", "dit")
    options = LoadOptions(cpu, torch.float32, torch.float32, None, ParallelMesh.single(), offload=moved)
    ours = edits.small(load_pipeline(checkpoints.root("qwen-image-edit-plus"), options))
    for made, expected in zip(edits.run_ours(case, ours), edits.run_ours(case), strict=True):
        assert torch.equal(made, expected)
    assert not options.residency.unused()
    assert options.residency.components_on_device() == ()
    assert ours.weights_bytes() < edits.ours.weights_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# The profile tells the truth


@pytest.mark.parametrize("settings", [{}, {"scale": 1.0, "width": 80, "outputs": 2}])
def test_the_profile_describes_what_the_pipeline_holds(parity: Any, settings: dict[str, Any]) -> None:
    state = advance(parity.ours, start(parity, **settings), 2)
    profile = parity.ours.profile(state.request)
    assert tuple(state.latents.shape) == profile.latent_shape
    assert state.latents.nbytes == profile.state_bytes
    assert profile.phases[0].batch_key.guided == (state.conditioning.negative is not None)
    text = [t for t in (state.conditioning.positive, state.conditioning.negative) if t is not None]
    longest = 512 * 32 * 4 * len(text)
    assert sum(t.nbytes for t in text) <= longest == profile.conditioning_bytes
    with torch.inference_mode():
        chunk, cursor = parity.ours.decode(state, None)
    assert cursor is None
    assert profile.chunk_frames == (1,)
    assert chunk.frames.nbytes == profile.chunk_bytes


def test_the_profile_of_an_edit_counts_its_pictures(edits: Any) -> None:
    one, three = (edits.ours.profile(edits.request(Case("", pictures=n))) for n in (1, 3))
    assert one.phases[0].batch_key == three.phases[0].batch_key
    assert one.tokens == three.tokens == 12
    kept = 4 * 4 * 128 * 128  # channels of 1024x1024 pixels in float32
    assert three.conditioning_bytes - one.conditioning_bytes == 2 * kept
    assert three.phases[0].step_cost > 4 * one.phases[0].step_cost  # attention grows with the square
    assert three.encode_cost > 2.5 * one.encode_cost


@pytest.mark.parametrize(("size", "references"), [((16, 24), 0), ((12, 8), 2)])
@torch.no_grad()
def test_the_costs_agree_with_counted_flop(parity: Any, size: tuple[int, int], references: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula: Callable[..., int] = sdpa_flop_count

    def attention_flop(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return formula(q, k, v)

    pictures = tuple(torch.randn(1, 4, 1, 8, 12) for _ in range(references))
    inputs = QwenInputs(torch.randn(1, 60, 32), pictures)
    with FlopCounterMode(display=False, custom_mapping={attention: attention_flop}) as counter:
        parity.ours.transformer(torch.randn(1, 4, 1, *size), torch.tensor([500.0]), inputs)
    tokens = size[0] * size[1] // 4 + 24 * references
    assert forward_flop(parity.ours.spec.transformer, tokens, 60) == pytest.approx(counter.get_total_flops(), rel=0.02)
    request = parity.request(Case("", width=128, height=128))
    profile = parity.ours.profile(request)
    with FlopCounterMode(display=False, custom_mapping={attention: attention_flop}) as counter:
        parity.ours.decode(start(parity, width=128, height=128), None)
    assert profile.decode_chunk_cost * 1e12 == pytest.approx(counter.get_total_flops(), rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# What comes in


def test_ids_of_a_foreign_tokenizer_are_refused(parity: Any) -> None:
    request = msgspec.structs.replace(parity.request(Case("")), token_ids={"prompt": (400_000,) * 40, "negative": (1,) * 40})  # fmt: skip  # noqa: E501
    with pytest.raises(ModelError, match="vocabulary"):
        parity.ours.encode(request)


@pytest.mark.parametrize("ids", [{}, {"prompt": (1,) * 40}, {"prompt": (1,) * 34, "negative": (1,) * 40}, {"prompt": (1,) * 547, "negative": (1,) * 40}])  # fmt: skip  # noqa: E501
def test_missing_or_too_many_ids_are_refused(parity: Any, ids: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InvalidRequest, match="35 to 546 ids expected"):
        parity.ours.encode(msgspec.structs.replace(parity.request(Case("")), token_ids=ids))


@torch.inference_mode()
def test_pictures_that_are_gone_or_are_not_those_of_the_tokens_are_errors(edits: Any) -> None:
    request: GenerationRequest = edits.request(Case("", pictures=2))
    gone = msgspec.structs.replace(request, images=(InputImage("0" * 64, 8, 8), request.images[1]))
    with pytest.raises(JobFailed, match="cannot be read"):
        edits.ours.encode(gone)
    with pytest.raises(ModelError, match="image tokens came"):
        edits.ours.encode(msgspec.structs.replace(request, images=request.images[:1]))
    with pytest.raises(JobFailed, match="without a folder"):
        replace(edits.ours, pictures=None).encode(request)


@torch.inference_mode()
def test_a_text_encoder_saved_with_the_names_of_today_is_read(checkpoints: Checkpoints, tmp_path: Path) -> None:
    root, made = checkpoints.root("qwen-image-edit-plus"), tmp_path / "text_encoder"
    made.mkdir()
    (made / "config.json").write_text((root / "text_encoder" / "config.json").read_text())
    renamed = {
        name.replace("visual.", "model.visual.").replace("model.layers", "model.language_model.layers")
        .replace("model.embed", "model.language_model.embed").replace("model.norm", "model.language_model.norm"): tensor
        for name, tensor in load_file(root / "text_encoder" / "model.safetensors").items()
    }  # fmt: skip
    save_file(renamed, made / "model.safetensors")
    both = [
        qwen2_5_vl.load_qwen2_5_vl(folder, torch.device("cpu"), torch.float32, vision=True)
        for folder in (root / "text_encoder", made)
    ]
    old, new = (encoder.encode([(5, 6, 7, 8)], 1)[0] for encoder in both)
    assert old.shape == (3, 32)
    assert torch.equal(old, new)


def test_another_text_encoder_or_vae_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    root = checkpoints.root("qwen-image")
    for name, change in (("text_encoder", {"model_type": "qwen2"}), ("vae", {"_class_name": "AutoencoderKLWan"}), ("vae", {"input_channels": 4})):  # fmt: skip  # noqa: E501
        copy = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        for path in root.rglob("*"):
            if path.is_file():
                target = copy / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path)
        config = copy / name / "config.json"
        values = json.loads(config.read_text(encoding="utf-8")) | change
        config.unlink()
        config.write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(ModelError, match="expected"):
            load_pipeline(copy, LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, ParallelMesh.single()))  # fmt: skip  # noqa: E501
