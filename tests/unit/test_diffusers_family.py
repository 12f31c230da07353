"""What is known of a diffusers pipeline before anything is loaded: the backend's choice, its limits, typed refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from safelight.configs.backend import check_backend, refuse_remote_code
from safelight.configs.config_file import load_config
from safelight.configs.families import FAMILIES, ModelSpec, check_images, identify
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.http_args import HttpArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.jobs import check_jobs, requests
from safelight.entrypoints.plan import show
from safelight.runtime.errors import ConfigError, InvalidRequest, ModelError, UnsupportedModel
from safelight.runtime.hub import builtin_model
from safelight.runtime.inputs import InputStore
from safelight.runtime.launch.folders import create_run_folder
from safelight.runtime.launch.processes import Group
from safelight.runtime.launch.specs import degrees_of, scheduler_spec, worker_spec
from safelight.runtime.messages import GenerationRequest, InputImage, MediaFormat, MediaSpec, SlotPool
from safelight.runtime.scheduler.main import Profiler


def write(root: Path, kind: Any, components: dict[str, Any], **configs: Any) -> Path:
    """A model directory of configs and an empty safetensors file each."""
    root.mkdir(exist_ok=True)
    (root / "model_index.json").write_text(json.dumps({"_class_name": kind, **components}))
    for name in components:
        (root / name).mkdir(exist_ok=True)
        (root / name / "config.json").write_text(json.dumps(configs.get(name, {})))
        (root / name / "model.safetensors").write_bytes(bytes(1000))
    return root


SD3 = {"transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
       "text_encoder": ["transformers", "CLIPTextModelWithProjection"]}  # fmt: skip


@pytest.fixture
def sd3(tmp_path: Path) -> ModelSpec:
    sizes = {"transformer": {"sample_size": 128, "patch_size": 2}, "vae": {"block_out_channels": [1, 2, 3, 4],
             "latent_channels": 16}}  # fmt: skip
    return identify(write(tmp_path / "sd3", "StableDiffusion3Pipeline", SD3, **sizes))


def test_auto_prefers_a_native_family_and_says_why(sd3: ModelSpec) -> None:
    builtin = identify(builtin_model())
    assert (FAMILIES[builtin.family].backend, builtin.reason) == ("safelight", "WanPipeline has a native family")
    assert FAMILIES[sd3.family].backend == "diffusers"
    assert "no native family runs StableDiffusion3Pipeline" in sd3.reason


def test_each_backend_can_be_asked_for(sd3: ModelSpec) -> None:
    assert identify(builtin_model(), "diffusers").variant == "WanPipeline"
    assert identify(builtin_model(), "diffusers").reason == "as asked"
    assert identify(builtin_model(), "safelight").family == "wan"
    with pytest.raises(UnsupportedModel, match="--backend diffusers") as caught:
        identify(sd3.root, "safelight")
    assert caught.value.param == "model_path"


def test_a_relative_that_the_native_family_does_not_run_goes_to_diffusers(tmp_path: Path) -> None:
    parts = {"transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"],
             "transformer_2": ["diffusers", "WanTransformer3DModel"]}  # fmt: skip
    spec = identify(write(tmp_path / "wan22", "WanPipeline", parts))
    assert FAMILIES[spec.family].backend == "diffusers"
    assert "two transformers" in spec.reason


def test_a_broken_native_checkpoint_does_not_go_to_diffusers(tmp_path: Path) -> None:
    root = write(tmp_path / "wan", "WanPipeline", {"transformer": ["diffusers", "WanTransformer3DModel"]})
    with pytest.raises(ModelError) as caught:
        identify(root)
    assert not isinstance(caught.value, UnsupportedModel)


def test_defaults_come_from_signature_and_configs(sd3: ModelSpec) -> None:
    d = sd3.defaults
    assert (d.height, d.width, d.num_frames) == (1024, 1024, 1)
    assert (d.num_inference_steps, d.guidance_scale, d.sampler) == (28, 7.0, "default")
    assert sd3.task == "text-to-image"
    FAMILIES[sd3.family].validate(sd3, d)


@pytest.mark.parametrize(
    ("name", "task", "images", "frames"),
    [
        ("PixArtAlphaPipeline", "text-to-image", (0, 0), 1),
        ("StableDiffusionImg2ImgPipeline", "image-to-image", (1, 1), 1),
        ("StableVideoDiffusionPipeline", "image-to-video", (1, 1), 16),
        ("LTXPipeline", "text-to-video", (0, 0), 161),
        ("CogVideoXPipeline", "text-to-video", (0, 0), 16),
        ("LattePipeline", "text-to-video", (0, 0), 16),
        ("FluxKontextPipeline", "text-to-image", (0, 1), 1),
    ],
)
def test_the_task_is_read_from_the_signature(
    tmp_path: Path, name: str, task: str, images: tuple[int, int], frames: int
) -> None:
    spec = identify(write(tmp_path / "m", name, {}))
    assert (spec.task, spec.images, spec.defaults.num_frames) == (task, images, frames)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDifusion3Pipeline", "did you mean 'StableDiffusion3Pipeline'"),
        ("os.system", "does not have"),
        ("SD3Transformer2DModel", "does not have"),
        ("DDPMPipeline", "step callback"),
        ("StableDiffusionInpaintPipeline", "mask_image"),
        ("StableAudioPipeline", "audio"),
    ],
)
def test_classes_that_cannot_be_served_are_refused_before_anything_starts(
    tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        identify(write(tmp_path / "m", name, {}))


@pytest.mark.parametrize(
    ("kind", "component"),
    [
        (["evil", "EvilPipeline"], ["diffusers", "X"]),
        ("StableDiffusion3Pipeline", ["evil", "Evil"]),
        ("StableDiffusion3Pipeline", ["subprocess", "Popen"]),
        ("StableDiffusion3Pipeline", ["../stable_diffusion", "X"]),
        ("StableDiffusion3Pipeline", ["diffusers", ["X"]]),
        (7, ["diffusers", "X"]),
    ],
)
def test_anything_but_classes_of_both_libraries_is_remote_code(tmp_path: Path, kind: Any, component: Any) -> None:
    root = write(tmp_path / "m", kind, {"transformer": component})
    with pytest.raises(ModelError, match="--trust-remote-code") as caught:
        identify(root)
    assert caught.value.param == "trust_remote_code"


def test_a_class_that_one_pipeline_defines_is_known_unless_the_checkpoint_replaces_it(tmp_path: Path) -> None:
    root = write(tmp_path / "m", "StableDiffusionPipeline", {"safety_checker": ["stable_diffusion", "Checker"]})
    assert identify(root).variant == "StableDiffusionPipeline"
    (root / "safety_checker" / "stable_diffusion.py").write_text("boom")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        identify(root)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pkl"])
def test_pickled_weights_are_refused(tmp_path: Path, suffix: str) -> None:
    root = write(tmp_path / "m", "StableDiffusion3Pipeline", SD3)
    weights = root / "vae" / "model.safetensors"
    weights.rename(weights.with_suffix(suffix))
    with pytest.raises(ModelError, match=f"model{suffix}.*safetensors"):
        identify(root)


def test_a_missing_component_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "m", "StableDiffusion3Pipeline", SD3)
    (root / "vae").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="no folder vae"):
        identify(root)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"height": 1020}, "height"),
        ({"width": 0}, "width"),
        ({"width": 8200}, "width"),
        ({"num_frames": 2}, "num_frames"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"num_outputs_per_prompt": 17}, "num_outputs_per_prompt"),
        ({"fps": 0}, "fps"),
        ({"seed": -1}, "seed"),
        ({"sampler": "unipc"}, "sampler"),
        ({"prompt": "x" * 20_001}, "prompt"),
    ],
)
def test_limits_of_requests(sd3: ModelSpec, changes: dict[str, Any], param: str) -> None:
    params = dataclasses.replace(sd3.defaults, **changes)
    with pytest.raises(InvalidRequest) as caught:
        FAMILIES[sd3.family].validate(sd3, params)
    assert caught.value.param == param


def test_a_parameter_that_the_call_does_not_take_is_refused(tmp_path: Path) -> None:
    spec = identify(write(tmp_path / "m", "StableVideoDiffusionPipeline", {}))
    changes: dict[str, Any] = {
        "negative_prompt": "bad",
        "guidance_scale": 3.0,
        "true_cfg_scale": 2.0,
        "cfg_truncation": 1.0,
    }
    for name, value in changes.items():
        params = dataclasses.replace(spec.defaults, **{name: value})
        with pytest.raises(InvalidRequest, match=f"takes no {name}"):
            FAMILIES[spec.family].validate(spec, params)


def test_true_cfg_scale_is_taken_where_the_call_has_it(tmp_path: Path) -> None:
    spec = identify(write(tmp_path / "m", "QwenImagePipeline", {}), "diffusers")
    assert spec.defaults.true_cfg_scale == 4.0
    FAMILIES[spec.family].validate(spec, dataclasses.replace(spec.defaults, true_cfg_scale=2.5))
    with pytest.raises(InvalidRequest, match="true_cfg_scale must be from 0 to 100"):
        FAMILIES[spec.family].validate(spec, dataclasses.replace(spec.defaults, true_cfg_scale=101.0))


def test_pictures_are_counted(sd3: ModelSpec, tmp_path: Path) -> None:
    img2img = identify(write(tmp_path / "m", "StableDiffusionImg2ImgPipeline", {}))
    check_images(sd3, 0)
    check_images(img2img, 1)
    for spec, count in ((sd3, 1), (img2img, 0), (img2img, 2)):
        with pytest.raises(InvalidRequest, match=f"got {count}") as caught:
            check_images(spec, count)
        assert caught.value.param == "image_path"


@pytest.mark.parametrize(
    ("kind", "images"),
    [
        ("StableDiffusion3Pipeline", (0, 0)),
        ("StableDiffusionImg2ImgPipeline", (1, 1)),  # to it a list is a batch
        ("QwenImageEditPlusPipeline", (1, 3)),
        ("Flux2KleinPipeline", (0, 4)),
        ("WanImageToVideoPipeline", (1, 2)),  # first and last frame
    ],
)
def test_how_many_pictures_a_pipeline_takes(tmp_path: Path, kind: str, images: tuple[int, int]) -> None:
    assert identify(write(tmp_path / "m", kind, {}), "diffusers").images == images


def test_a_picture_that_is_not_named_by_its_hash_is_refused_at_once(tmp_path: Path) -> None:
    profiler = Profiler(write(tmp_path / "m", "StableDiffusionImg2ImgPipeline", {}))
    media = MediaSpec(MediaFormat.PNG)
    for name, accepted in (("a" * 64, True), ("../../etc/passwd", False)):
        images = (InputImage(name, 8, 8),)
        request = GenerationRequest("a", "", {}, 64, 64, 1, 16, 2, 5.0, 1, 1, "default", media, images)
        with contextlib.nullcontext() if accepted else pytest.raises(InvalidRequest, match="sha256"):
            profiler.profile_of(request)


def test_costs_grow_with_what_is_asked_for(sd3: ModelSpec) -> None:
    family = FAMILIES[sd3.family]
    small = family.profile(sd3, SamplingParams(height=512, width=512).merged_over(sd3.defaults))
    large = family.profile(sd3, sd3.defaults)
    unguided = family.profile(sd3, SamplingParams(guidance_scale=1.0).merged_over(sd3.defaults))
    assert large.tokens == 4 * small.tokens == 4096
    assert large.phases[0].step_cost == pytest.approx(4 * small.phases[0].step_cost)
    assert unguided.phases[0].step_cost == pytest.approx(large.phases[0].step_cost / 2)
    assert large.chunk_bytes == 1024 * 1024 * 3
    assert large.chunk_frames == (1,)
    assert not large.resumable


@pytest.mark.parametrize(
    ("args", "param"),
    [
        ({"num_gpus": 2}, "num_gpus"),
        ({"num_gpus": 4, "replicas": 2, "worker_endpoint": "ipc:///x/join"}, "num_gpus"),
        ({"checkpoint_every": 5}, "checkpoint_every"),
        ({"attention_backend": "torch_sdpa"}, "attention_backend"),
        ({"vae_path": "elsewhere"}, "vae_path"),
        ({"diffusers_kwargs": {"max_sequence_len": 77}}, "diffusers_kwargs"),
        ({"diffusers_kwargs": {"height": 77}}, "diffusers_kwargs"),
        ({"diffusers_kwargs": {"generator": 1}}, "diffusers_kwargs"),
        ({"diffusers_kwargs": {"max_sequence_length": {1, 2}}}, "diffusers_kwargs"),
    ],
)
def test_arguments_that_diffusers_cannot_follow_are_refused(sd3: ModelSpec, args: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        degrees_of(ServerArgs(**args), sd3.root)
    assert caught.value.param == param


def test_a_further_argument_is_suggested_by_name(sd3: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_sequence_length'"):
        check_backend(ServerArgs(diffusers_kwargs={"max_sequence_len": 77}), sd3)
    check_backend(ServerArgs(diffusers_kwargs={"max_sequence_length": 77}), sd3)


@pytest.mark.parametrize(
    "args",
    [
        {"vae_slicing": True},
        {"diffusers_attention_backend": "native"},
        {"diffusers_kwargs": {"eta": 1}},
        {"trust_remote_code": True},
    ],
)
def test_arguments_of_diffusers_are_refused_for_a_native_model(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="does nothing with the backend safelight") as caught:
        degrees_of(ServerArgs(**args), builtin_model())
    assert caught.value.param == next(iter(args))


@pytest.mark.parametrize("part", ["dit", "text_encoder", "image_encoder", "vae"])
def test_offloading_is_refused_with_the_backend_diffusers(sd3: ModelSpec, part: str) -> None:
    name = f"{part}_cpu_offload"
    args: dict[str, Any] = {name: True}
    with pytest.raises(ConfigError, match="one call at a time") as caught:
        check_backend(ServerArgs(**args), sd3)
    assert caught.value.param == name
    assert f"--{name.replace('_', '-')}:" in caught.value.message
    check_backend(ServerArgs(**args), identify(builtin_model()))


def test_replicas_may_share_the_gpus(sd3: ModelSpec) -> None:
    assert degrees_of(ServerArgs(num_gpus=2, replicas=2), sd3.root).world_size == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_remote_code_is_allowed_where_only_this_machine_can_ask(host: str) -> None:
    refuse_remote_code(ServerArgs(trust_remote_code=True), HttpArgs(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org", "127.0.0.1.example.org"])
def test_remote_code_is_refused_where_others_can_ask(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_remote_code(ServerArgs(trust_remote_code=True), HttpArgs(host=host))
    assert caught.value.param == "trust_remote_code"
    refuse_remote_code(ServerArgs(), HttpArgs(host=host))


def test_no_layout_is_planned_for_a_model_that_runs_on_one_gpu(sd3: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="runs on one GPU") as caught:
        show(str(sd3.root), 4, as_json=False)
    assert caught.value.param == "plan"


def test_further_arguments_come_from_a_config_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("backend: diffusers\ndiffusers-kwargs:\n  strength: 0.5\n  clip_skip: null\n")
    values = load_config(file, (ServerArgs,))
    args = ServerArgs(**values)
    assert (args.backend, args.diffusers_kwargs) == ("diffusers", {"strength": 0.5, "clip_skip": None})
    file.write_text("diffusers_kwargs: strength\n")
    with pytest.raises(ConfigError, match="names and values expected"):
        load_config(file, (ServerArgs,))


def test_the_arguments_reach_scheduler_and_workers(sd3: ModelSpec, tmp_path: Path) -> None:
    args = ServerArgs(
        backend="diffusers", trust_remote_code=True, vae_slicing=True, vae_tiling=True,
        diffusers_attention_backend="native", diffusers_kwargs={"skip_layer_guidance_scale": 1.0},
    )  # fmt: skip
    run = create_run_folder(tmp_path / "state")
    try:
        pool = SlotPool("x", 1, 1)
        worker = worker_spec(args, run, pool, sd3.root, "cpu", Group(0), 0)
        scheduler = scheduler_spec(args, run, pool, sd3.root)
    finally:
        run.remove()
    assert worker.trust_remote_code
    assert scheduler.trust_remote_code
    assert worker.vae_slicing
    assert worker.vae_tiling
    assert worker.backend == scheduler.backend == "diffusers"
    assert worker.diffusers_attention_backend == "native"
    assert worker.diffusers_kwargs == {"skip_layer_guidance_scale": 1.0}
    assert worker.input_dir == scheduler.input_dir == str(tmp_path / "state" / "inputs")


def test_a_picture_is_checked_counted_stored_and_gives_its_size(tmp_path: Path) -> None:
    vae = {"block_out_channels": [1, 2, 3, 4]}
    parts = {"vae": ["diffusers", "AutoencoderKL"]}
    spec = identify(write(tmp_path / "m", "StableDiffusionImg2ImgPipeline", parts, vae=vae))
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (100, 75), (200, 30, 4)).save(photo)
    params = SamplingParams(prompt="a", image_path=(str(photo),))
    jobs = check_jobs(spec, [("", params), ("", dataclasses.replace(params, height=64))], GenerateArgs())
    assert [(job.params.width, job.params.height) for job in jobs] == [(96, 72), (96, 64)]
    folder = tmp_path / "inputs"
    folder.mkdir()
    made = list(requests(spec, jobs, InputStore(folder)))
    assert made[0].images == made[1].images
    assert InputStore(folder).read(made[0].images[0]).size == (100, 75)
    assert made[0].token_ids == {}
    for wrong, message in (("no such file", "cannot be read"), (str(spec.root / "model_index.json"), "PNG, JPEG")):
        with pytest.raises(InvalidRequest, match=message) as caught:
            check_jobs(spec, [("", dataclasses.replace(params, image_path=(wrong,)))], GenerateArgs())
        assert caught.value.param == "image_path"
    twice = dataclasses.replace(params, image_path=(str(photo), "no such file"))  # counted before it is read
    with pytest.raises(InvalidRequest, match=r"1 expected .* got 2"):
        check_jobs(spec, [("", twice)], GenerateArgs())
    with pytest.raises(InvalidRequest, match="0 expected"):
        check_jobs(identify(builtin_model()), [("", params)], GenerateArgs())
    jobs = check_jobs(spec, [("", dataclasses.replace(params, prompt="\ud800"))], GenerateArgs())
    with pytest.raises(InvalidRequest, match="surrogate"):
        list(requests(spec, jobs, InputStore(folder)))
