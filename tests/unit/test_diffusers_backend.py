"""Pipelines of diffusers without a native family, run by the worker's real code: what diffusers gives when it is called
directly, bit for bit, also when jobs interleave; and nothing is left of a job that was dropped."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers_checkpoints
import numpy as np
import pytest
import torch
from msgspec import structs
from PIL import Image

from safelight.configs.families import identify
from safelight.configs.families.calls import signature_of
from safelight.runtime.errors import ConfigError, InvalidRequest, ModelError
from safelight.runtime.inputs import InputStore, check_picture, picture_of
from safelight.runtime.messages import (
    Decode,
    Denoise,
    Drop,
    Encode,
    Endpoints,
    GenerationRequest,
    HeldState,
    InputImage,
    MediaFormat,
    MediaSpec,
    Op,
    Plan,
    Prepare,
    Release,
    SlotPool,
    UnitRef,
    WorkerSpec,
)
from safelight.runtime.models.diffusers_backend import shared
from safelight.runtime.models.diffusers_backend.pipeline import DiffusersPipeline
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.worker.checkpoint import CheckpointWriter
from safelight.runtime.worker.executor import Executor, Launched

# numpy and torch, transformers' replacements of classes: other packages' affairs
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
]
STEPS = 4
KWARGS: dict[str, dict[str, Any]] = {
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "stable_diffusion_img2img": {"strength": 0.75},
}
ALL = ("stable_diffusion_pag", "pixart", "stable_diffusion_3", "ltx", "stable_diffusion_img2img")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("checkpoints")

    def made(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else diffusers_checkpoints.write(name, folder)

    return made


def options(**changes: Any) -> LoadOptions:
    values: dict[str, Any] = {
        "device": torch.device("cpu"), "dit_dtype": torch.float32, "vae_dtype": torch.float32, "vae_path": None,
        "mesh": ParallelMesh.single(),
    }  # fmt: skip
    return LoadOptions(**values | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def pipeline(checkpoint: Callable[[str], Path], store: Path) -> Callable[[str], DiffusersPipeline]:
    loaded: dict[str, Any] = {}

    def get(name: str) -> DiffusersPipeline:
        if name not in loaded:
            given = options(diffusers_kwargs=KWARGS.get(name, {}), input_dir=store)
            loaded[name] = load_pipeline(checkpoint(name), given)
        return loaded[name]  # type: ignore[no-any-return]

    return get


class Rig:
    """One rank's executor; runs ops as plans."""

    def __init__(self, pipeline: Any, folder: Path) -> None:
        spec = WorkerSpec(
            endpoints=Endpoints(*["ipc:///unused"] * 6), group=0, rank=0, world_size=1, group_epoch=0, local_rank=0,
            store="", model_path="", vae_path=None, device="cpu", dit_precision="fp32", vae_precision="fp32",
            checkpoint_dir=str(folder), slots=SlotPool(str(folder), 1, 1), num_threads=1, ranks_on_host=1,
            log_level="info",
        )  # fmt: skip
        self.executor = Executor(pipeline, spec, CheckpointWriter(folder), lambda message: None)

    def run(self, *ops: Op) -> Launched:
        with torch.inference_mode():
            return self.executor.execute(Plan(0, 0, 0, 0, ops))

    def errors(self, *ops: Op) -> list[tuple[str, str]]:
        return [(op.error.code, op.error.message) for op in self.run(*ops).ops if op.error]

    def frames(self, job: str, index: int = 0) -> np.ndarray[Any, Any]:
        (op,) = self.run(Decode(job, 0, index, 0, 0, 0)).ops
        assert op.error is None, op.error
        assert op.chunk is not None
        assert op.chunk.last
        return op.chunk.frames.numpy()

    def begin(self, job: str, request: GenerationRequest, index: int = 0) -> None:
        assert self.errors(Encode(job, 0, request), Prepare(job, 0, index)) == []

    def alone(self, job: str, request: GenerationRequest) -> np.ndarray[Any, Any]:
        self.begin(job, request)
        assert self.errors(*(step(job, number) for number in range(request.num_inference_steps))) == []
        frames = self.frames(job)
        self.run(Drop(job, 0))
        return frames


@pytest.fixture
def rig(pipeline: Callable[[str], DiffusersPipeline], tmp_path: Path) -> Callable[[str], Rig]:
    return lambda name: Rig(pipeline(name), tmp_path)


def step(job: str, number: int, index: int = 0) -> Denoise:
    return Denoise((UnitRef(job, 0, index, number),))


def request_for(pipeline: DiffusersPipeline, **changes: Any) -> GenerationRequest:
    defaults = pipeline.spec.defaults
    values: dict[str, Any] = {
        "prompt": "a cat", "negative_prompt": "", "token_ids": {}, "height": 32, "width": 32,
        "num_frames": 9 if pipeline.spec.task.endswith("video") else 1, "fps": 25, "num_inference_steps": STEPS,
        "guidance_scale": defaults.guidance_scale, "seed": 5, "num_outputs": 1, "sampler": "default",
        "media": MediaSpec(MediaFormat.NPY),
    }  # fmt: skip
    if pipeline.spec.images[0]:
        assert pipeline.inputs is not None
        values["images"] = (picture(pipeline.inputs),)
    return GenerationRequest(**values | changes)


def picture(inputs: InputStore) -> InputImage:
    pixels = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return inputs.add(check_picture(file.getvalue()))


def directly(folder: Path, pipeline: DiffusersPipeline, request: GenerationRequest, index: int = 0) -> Any:
    """The frames of diffusers itself: another load of the checkpoint, called as its documentation says."""
    pipe: Any = diffusers_checkpoints.diffusers.DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"guidance_scale": request.guidance_scale}
    if request.negative_prompt:
        given["negative_prompt"] = request.negative_prompt
    if request.num_frames > 1:
        given |= {"num_frames": request.num_frames, "frame_rate": request.fps}
    if request.images:
        assert pipeline.inputs is not None
        given["image"] = pipeline.inputs.read(request.images[0])
    else:
        given |= {"height": request.height, "width": request.width}
    result = pipe(
        prompt=request.prompt, num_inference_steps=request.num_inference_steps, output_type="pil",
        generator=torch.Generator("cpu").manual_seed(request.seed + index), **given, **pipeline.kwargs,
    )  # fmt: skip
    made = result.frames[0] if request.num_frames > 1 else result.images
    return np.stack([np.asarray(image) for image in made])


@pytest.mark.parametrize("name", ALL)
def test_the_result_is_that_of_diffusers_called_directly(
    name: str,
    rig: Callable[[str], Rig],
    pipeline: Callable[[str], DiffusersPipeline],
    checkpoint: Callable[[str], Path],
) -> None:
    loaded = pipeline(name)
    request = request_for(loaded, negative_prompt="bad", seed=11)
    expected = directly(checkpoint(name), loaded, request)
    assert np.array_equal(rig(name).alone("a", request), expected)
    other = rig(name).alone("b", request_for(loaded, prompt="two dogs", negative_prompt="bad", seed=11))
    assert not np.array_equal(other, expected), "the prompt reaches the model"


@pytest.mark.parametrize("name", ALL)
def test_interleaved_jobs_give_the_bits_of_jobs_alone(
    name: str, rig: Callable[[str], Rig], pipeline: Callable[[str], DiffusersPipeline]
) -> None:
    r, loaded = rig(name), pipeline(name)
    requests = {
        "a": request_for(loaded, seed=1),
        "b": request_for(loaded, seed=2, prompt="two dogs", num_inference_steps=STEPS + 3, guidance_scale=2.0),
        "c": request_for(loaded, seed=3, num_inference_steps=2),
    }
    alone = {job: r.alone(job, request) for job, request in requests.items()}
    left = {job: iter(range(request.num_inference_steps)) for job, request in requests.items()}
    together: dict[str, Any] = {}
    for job, request in requests.items():
        r.begin(job, request)
    while left:
        for job in list(left):
            number = next(left[job], None)
            if number is None:
                del left[job]
                together[job] = r.frames(job)  # while the others are in the middle
            else:
                assert r.errors(step(job, number)) == []
    for job in requests:
        assert np.array_equal(together[job], alone[job]), job


def test_a_call_that_changes_the_shared_model_would_spoil_the_others(
    rig: Callable[[str], Rig], pipeline: Callable[[str], DiffusersPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: PAG's processors, left in the UNet while another job runs, show."""
    r, loaded = rig("stable_diffusion_pag"), pipeline("stable_diffusion_pag")
    longer, shorter = request_for(loaded, seed=1), request_for(loaded, seed=2, num_inference_steps=2)
    alone, processors = r.alone("a", longer), loaded.pipe.unet.attn_processors
    monkeypatch.setattr(shared, "_differs", lambda module, own: False)
    r.begin("b", shorter)
    r.begin("a", longer)
    for number in range(2):
        assert r.errors(step("b", number), step("a", number)) == []
    r.frames("b")  # its end puts back what it found
    r.run(*(step("a", number) for number in range(2, STEPS)))
    (op,) = r.run(Decode("a", 0, 0, 0, 0, 0)).ops
    spoiled = op.chunk is None or not np.array_equal(op.chunk.frames.numpy(), alone)
    r.run(Drop("a", 0), Drop("b", 0))
    loaded.pipe.unet.set_attn_processor(dict(processors))
    assert spoiled


@pytest.mark.parametrize("name", ["pixart", "stable_diffusion_3"])
def test_a_step_runs_the_transformer_once_and_other_ops_never(
    name: str, rig: Callable[[str], Rig], pipeline: Callable[[str], DiffusersPipeline]
) -> None:
    r, loaded = rig(name), pipeline(name)
    counts = {"forwards": 0, "decodes": 0}
    denoiser = loaded.pipe.transformer
    handle = denoiser.register_forward_pre_hook(lambda *_: counts.update(forwards=counts["forwards"] + 1))
    loaded.shared.__init__([denoiser])  # type: ignore[misc]  # the hook is the model's own from now on
    decode = loaded.pipe.vae.decode

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts["decodes"] += 1
        return decode(*args, **kwargs)

    loaded.pipe.vae.decode = counted
    try:
        r.begin("a", request_for(loaded))
        assert counts == {"forwards": 0, "decodes": 0}
        for number in range(STEPS):
            assert r.errors(step("a", number)) == []
            assert counts == {"forwards": number + 1, "decodes": 0}
        r.frames("a")
        r.frames("a")  # a second take, for an output process that was started again
        assert counts == {"forwards": STEPS, "decodes": 1}
    finally:
        del loaded.pipe.vae.decode
        handle.remove()
        loaded.shared.__init__([denoiser])  # type: ignore[misc]
        r.run(Drop("a", 0))


def test_a_loop_of_another_length_is_spread_over_the_steps_asked_for(
    rig: Callable[[str], Rig], pipeline: Callable[[str], DiffusersPipeline]
) -> None:
    done: dict[str, list[int]] = {}
    for name, steps in (("stable_diffusion_pag", 4), ("stable_diffusion_img2img", 8)):
        r, loaded = rig(name), pipeline(name)
        r.begin("a", request_for(loaded, num_inference_steps=steps))
        done[name] = []
        for number in range(steps):
            assert r.errors(step("a", number)) == []
            done[name].append(r.executor._jobs["a", 0].states[0].call.done)  # type: ignore[attr-defined]
        r.frames("a")
        r.run(Drop("a", 0))
    assert done["stable_diffusion_pag"] == [2, 3, 4, 5]  # PNDM makes one more
    assert done["stable_diffusion_img2img"][-1] in (6, 7)  # strength 0.75 of 8, and PNDM
    assert done["stable_diffusion_img2img"] == sorted(done["stable_diffusion_img2img"])


def test_outputs_of_a_job_have_seeds_of_their_own(
    rig: Callable[[str], Rig], pipeline: Callable[[str], DiffusersPipeline], checkpoint: Callable[[str], Path]
) -> None:
    r, loaded = rig("stable_diffusion_3"), pipeline("stable_diffusion_3")
    request = request_for(loaded, num_outputs=2)
    assert r.errors(Encode("a", 0, request)) == []
    for index in range(2):
        assert r.errors(Prepare("a", 0, index), *(step("a", n, index) for n in range(STEPS))) == []
        expected = directly(checkpoint("stable_diffusion_3"), loaded, request, index)
        assert np.array_equal(r.frames("a", index), expected)
        assert r.errors(Release("a", 0, index)) == []
    assert r.executor.held() == (HeldState("a", 0, -1, 0),)
    r.run(Drop("a", 0))


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What must be freed is freed without the garbage collector's help."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors() -> int:
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize(("name", "steps"), [*((name, 2) for name in ALL), ("stable_diffusion_3", 0)])
@pytest.mark.usefixtures("no_collection")
def test_nothing_is_left_of_a_job_that_was_dropped_in_the_middle(
    name: str, steps: int, rig: Callable[[str], Rig], pipeline: Callable[[str], DiffusersPipeline]
) -> None:
    r, loaded = rig(name), pipeline(name)
    expected = r.alone("first", request_for(loaded))
    gc.collect()
    processors, before = processors_of(loaded), tensors()
    r.begin("a", request_for(loaded))
    assert r.errors(*(step("a", number) for number in range(steps))) == []
    assert tensors() > before
    assert [thread for thread in threading.enumerate() if thread.name == "diffusers call"]
    assert r.errors(Drop("a", 0)) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "diffusers call"]
    assert tensors() == before
    assert r.executor.held() == ()
    assert processors_of(loaded) == processors
    assert np.array_equal(r.alone("again", request_for(loaded)), expected)


def processors_of(loaded: DiffusersPipeline) -> list[int]:
    modules = loaded.pipe.vae.modules()
    denoiser = getattr(loaded.pipe, "transformer", None) or loaded.pipe.unet
    return [id(getattr(module, "processor", None)) for module in (*modules, *denoiser.modules())]


@pytest.mark.usefixtures("no_collection")
def test_a_job_that_fails_in_a_step_frees_its_call_and_spares_the_others(
    rig: Callable[[str], Rig], pipeline: Callable[[str], DiffusersPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    r, loaded = rig("stable_diffusion_3"), pipeline("stable_diffusion_3")
    expected = r.alone("first", request_for(loaded))
    gc.collect()
    before = tensors()
    r.begin("a", request_for(loaded))
    r.begin("bad", request_for(loaded))
    call = r.executor._jobs["bad", 0].states[0].call  # type: ignore[attr-defined]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("a pipeline's own mistake")

    call._own.scheduler.step = broken
    for number in range(STEPS):
        assert r.errors(step("a", number)) == []
        if number == 1:
            ((code, message),) = r.errors(step("bad", 0))
            assert code == "job_failed"
            assert "AttributeError: a pipeline's own mistake" in message
    del call
    r.run(Drop("bad", 0))
    assert np.array_equal(r.frames("a"), expected)
    r.run(Drop("a", 0))
    assert tensors() == before


def test_a_request_that_the_pipeline_refuses_is_an_invalid_request(
    rig: Callable[[str], Rig], pipeline: Callable[[str], DiffusersPipeline]
) -> None:
    r, loaded = rig("ltx"), pipeline("ltx")
    request = request_for(loaded, height=36)
    ((code, message),) = r.errors(Encode("a", 0, request), Prepare("a", 0, 0))
    assert code == InvalidRequest.code
    assert "LTXPipeline" in message
    assert "divisible" in message


def test_frames_of_another_size_than_asked_for_fail_the_job(
    rig: Callable[[str], Rig], pipeline: Callable[[str], DiffusersPipeline]
) -> None:
    r, loaded = rig("ltx"), pipeline("ltx")
    r.begin("a", request_for(loaded, num_frames=10))  # the pipeline makes 9
    r.run(*(step("a", number) for number in range(STEPS)))
    ((code, message),) = r.errors(Decode("a", 0, 0, 0, 0, 0))
    assert code == "job_failed"
    assert "9x32x32x3" in message
    assert "10x32x32x3" in message


def test_a_picture_is_scaled_where_the_size_follows_it(
    rig: Callable[[str], Rig], pipeline: Callable[[str], DiffusersPipeline]
) -> None:
    name = "stable_diffusion_img2img"
    request = request_for(pipeline(name), height=48, width=64)
    assert rig(name).alone("a", request).shape == (1, 48, 64, 3)


@pytest.mark.parametrize(
    ("kind", "names"), [("QwenImageEditPlusPipeline", ["image"]), ("WanImageToVideoPipeline", ["image", "last_image"])]
)
def test_two_pictures_go_where_the_pipeline_takes_them(
    pipeline: Callable[[str], DiffusersPipeline], store: Path, kind: str, names: list[str]
) -> None:
    img2img = pipeline("stable_diffusion_img2img")
    spec = dataclasses.replace(img2img.spec, call=signature_of(kind), image_grid=0)
    inputs = InputStore(store)
    refs = tuple(inputs.add(picture_of(Image.new("RGB", (side, 8)))) for side in (16, 24))
    request = request_for(img2img, images=refs, num_inference_steps=5)
    encoded = dataclasses.replace(img2img, spec=spec, inputs=inputs, kwargs={}).encode(request)
    given = [encoded[name] for name in names]
    if len(names) == 1:
        (given,) = given
    assert [image.size for image in given] == [(16, 8), (24, 8)]
    one = dataclasses.replace(img2img, spec=spec, inputs=inputs).encode(structs.replace(request, images=refs[:1]))
    assert one["image"].size == (16, 8)
    assert "last_image" not in one


def test_no_checkpoint_is_made_or_taken(pipeline: Callable[[str], DiffusersPipeline]) -> None:
    loaded = pipeline("pixart")
    profile = loaded.profile(request_for(loaded))
    assert not profile.resumable
    assert not profile.batchable
    assert loaded.weights_bytes() > 0


# --------------------------------------------------------------------------------------------------------------------
# Loading


def test_weights_are_read_from_safetensors_only(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint("pixart"), tmp_path / "pixart")
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="pickled"):
        identify(broken)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(ModelError, match="diffusers cannot load it"):
        load_pipeline(broken, options())
    weights.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="diffusers cannot load it"):
        load_pipeline(broken, options())


def test_code_of_a_checkpoint_runs_only_when_trusted(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("pixart"), tmp_path / "own")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["own_pipeline", "OwnPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    proof = tmp_path / "it ran"
    (folder / "own_pipeline.py").write_text(
        f"from pathlib import Path\nfrom diffusers import PixArtAlphaPipeline\nPath({str(proof)!r}).touch()\n"
        "class OwnPipeline(PixArtAlphaPipeline):\n    pass\n"
    )
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_pipeline(folder, options())
    assert not proof.exists()
    loaded = load_pipeline(folder, options(trust_remote_code=True))
    assert proof.exists()
    assert type(loaded.pipe).__name__ == "OwnPipeline"  # type: ignore[attr-defined]


def test_precisions_hold_and_the_vae_takes_latents_of_another(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    given = options(dit_dtype=torch.bfloat16, vae_dtype=torch.float32)
    loaded: Any = load_pipeline(checkpoint("stable_diffusion_3"), given)
    assert loaded.pipe.transformer.dtype == loaded.pipe.text_encoder_3.dtype == torch.bfloat16
    assert loaded.pipe.vae.dtype == torch.float32
    assert Rig(loaded, tmp_path).alone("a", request_for(loaded)).shape == (1, 32, 32, 3)


def test_tiling_and_slicing_reach_the_vae(checkpoint: Callable[[str], Path]) -> None:
    loaded: Any = load_pipeline(checkpoint("pixart"), options(vae_tiling=True, vae_slicing=True))
    assert loaded.pipe.vae.use_tiling
    assert loaded.pipe.vae.use_slicing
    plain: Any = load_pipeline(checkpoint("pixart"), options())
    assert not plain.pipe.vae.use_tiling
    assert not plain.pipe.vae.use_slicing


def test_an_attention_backend_is_set_for_the_pipeline_and_not_for_the_process(
    checkpoint: Callable[[str], Path], tmp_path: Path, pipeline: Callable[[str], DiffusersPipeline]
) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    registry: Any = _AttentionBackendRegistry  # untyped
    before = registry.get_active_backend()
    loaded: Any = load_pipeline(checkpoint("ltx"), options(diffusers_attention_backend="_native_math"))
    assert registry.get_active_backend() == before
    processors = [m.processor for m in loaded.pipe.transformer.modules() if hasattr(m, "processor")]
    assert {p._attention_backend for p in processors} == {"_native_math"}
    frames = Rig(loaded, tmp_path).alone("a", request_for(loaded))
    usual = Rig(pipeline("ltx"), tmp_path).alone("a", request_for(loaded))
    assert np.abs(frames.astype(int) - usual.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("name", "backend", "message"),
    [("ltx", "flsh", "no 'flsh'; did you mean"), ("ltx", "flash", "cannot be had here"),
     ("stable_diffusion_pag", "native", "can be chosen")],
)  # fmt: skip
def test_an_attention_backend_that_cannot_be_had_is_an_error(
    checkpoint: Callable[[str], Path], name: str, backend: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_pipeline(checkpoint(name), options(diffusers_attention_backend=backend))
    assert caught.value.param == "diffusers_attention_backend"


def test_further_arguments_reach_the_call(
    checkpoint: Callable[[str], Path], pipeline: Callable[[str], DiffusersPipeline], tmp_path: Path
) -> None:
    usual = pipeline("stable_diffusion_pag")
    given = dataclasses.replace(usual, kwargs={"guidance_rescale": 0.7})
    request = request_for(usual)
    expected = directly(checkpoint("stable_diffusion_pag"), given, request)
    assert np.array_equal(Rig(given, tmp_path).alone("a", request), expected)
    assert not np.array_equal(Rig(usual, tmp_path).alone("a", request), expected)
    with pytest.raises(ConfigError, match="did you mean 'guidance_rescale'"):
        load_pipeline(checkpoint("stable_diffusion_pag"), options(diffusers_kwargs={"guidance_rescal": 0.7}))


def test_signatures_are_those_of_the_classes() -> None:
    """Read from the source here, by Python's own means there."""
    for name in ("StableDiffusion3Pipeline", "PixArtSigmaPipeline", "LTXImageToVideoPipeline", "SanaPipeline"):
        read, actual = (
            signature_of(name),
            inspect.signature(getattr(diffusers_checkpoints.diffusers, name).__call__).parameters,
        )
        assert {*read.required, *read.defaults} == set(actual) - {"self", "kwargs"}
        assert all(read.defaults[n] == p.default for n, p in actual.items() if isinstance(p.default, int | float))
