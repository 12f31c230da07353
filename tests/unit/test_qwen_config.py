"""Qwen-Image's data file: which checkpoint is which, valid requests, sizes of pictures, and prompts as token ids."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from safelight.configs.families import FAMILIES, ModelSpec, identify
from safelight.configs.families.qwen import ASPECT_RATIOS, FAMILY, size_of, validate
from safelight.configs.families.qwen_costs import MAX_EDIT_TEXT
from safelight.configs.families.qwen_pictures import EDIT_RULES, Patches, fitted
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.jobs import check_jobs, request_of
from safelight.entrypoints.plan import find_model
from safelight.entrypoints.serve import frame_bytes, most_pixels
from safelight.runtime.errors import InvalidRequest, ModelError, UnsupportedModel
from safelight.runtime.text.qwen import PLACEHOLDER, TEMPLATES, QwenTokenizer, load_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ("qwen-image", "qwen-image-edit", "qwen-image-edit-plus", "qwen-image-edit-2511")


def script(name: str) -> ModuleType:
    """A module of scripts/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints."""
    folder, make = tmp_path_factory.mktemp("qwen"), script("make_checkpoint").make
    for name in NAMES:
        make(name, folder / name)
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def specs(roots: dict[str, Path]) -> dict[str, ModelSpec]:
    return {name: identify(root) for name, root in roots.items()}


@pytest.fixture
def copy(roots: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the edit-plus checkpoint to change: links, so that it costs nothing."""
    root = roots["qwen-image-edit-plus"]
    for path in root.rglob("*"):
        if path.is_file():
            target = tmp_path / "model" / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return tmp_path / "model"


def changed(root: Path, component: str, **changes: Any) -> Path:
    path = root / component
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.unlink()
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
    return root


def complete(spec: ModelSpec, **changes: Any) -> SamplingParams:
    return SamplingParams(**changes).merged_over(spec.defaults)


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint


def test_each_pipeline_class_is_its_variant(specs: dict[str, ModelSpec]) -> None:
    found = [(specs[name].variant, specs[name].task, specs[name].images) for name in NAMES]
    assert found == [
        ("Qwen-Image", "text-to-image", (0, 0)),
        ("Qwen-Image-Edit", "image-edit", (1, 1)),
        ("Qwen-Image-Edit-2509", "image-edit", (1, 3)),
        ("Qwen-Image-Edit-2511", "image-edit", (1, 3)),
    ]
    assert all(spec.family == "qwen" for spec in specs.values())


def test_published_sizes_have_their_authors_defaults() -> None:
    defaults = {variant.name: variant.defaults for variant in FAMILY.variants}
    steps = {name: each.num_inference_steps for name, each in defaults.items()}
    assert steps == {"Qwen-Image": 50, "Qwen-Image-2512": 50, "Qwen-Image-Edit": 50, "Qwen-Image-Edit-2509": 40, "Qwen-Image-Edit-2511": 40}  # fmt: skip  # noqa: E501
    assert {each.true_cfg_scale for each in defaults.values()} == {4.0}
    assert (defaults["Qwen-Image"].width, defaults["Qwen-Image"].height) == ASPECT_RATIOS["1:1"]
    assert defaults["Qwen-Image"].negative_prompt == defaults["Qwen-Image-Edit-2511"].negative_prompt == " "
    assert "AI" in str(defaults["Qwen-Image-2512"].negative_prompt)


def test_published_models_can_be_planned_without_their_files() -> None:
    specs = [find_model(variant.hub_id) for variant in FAMILY.variants]
    costs = [FAMILY.profile(spec, spec.defaults).phases[0].step_cost for spec in specs]
    assert costs[0] == costs[1] < costs[3] == costs[4] < costs[2]  # pictures are tokens; -Edit shows them larger
    assert all(FAMILY.guided_by_default(spec) for spec in specs)
    assert FAMILY.attention_of(specs[3]).joint_text > 4096 > FAMILY.attention_of(specs[0]).joint_text


def test_2512_is_known_by_its_path(roots: dict[str, Path], tmp_path: Path) -> None:
    there = tmp_path / "models--Qwen--Qwen-Image-2512" / "snapshots"
    there.mkdir(parents=True)
    (there / "abc").symlink_to(roots["qwen-image"])
    assert identify(there / "abc").variant == "Qwen-Image-2512"


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer/config.json", {"use_layer3d_rope": True}, "use_layer3d_rope"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds"),
        ("vae/config.json", {"temperal_downsample": [True, True, True]}, "not the VAE of Qwen-Image"),
    ],
)
def test_relatives_are_left_to_diffusers(copy: Path, component: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        identify(changed(copy, component, **changes), "safelight")
    assert identify(copy).family == "diffusers"


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer/config.json", {"num_layers": 0}, "num_layers must be a positive integer"),
        ("transformer/config.json", {"joint_attention_dim": 64}, "the text encoder is 32 wide"),
        ("vae/config.json", {"z_dim": 8}, "4 latents of the VAE have 32"),
        ("text_encoder/config.json", {"text_config": None}, "hidden_size must be a positive integer"),
    ],
)
def test_configs_that_do_not_fit_are_named(copy: Path, component: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        identify(changed(copy, component, **changes))


def test_an_edit_model_without_its_processor_is_named(copy: Path) -> None:
    (copy / "processor" / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json is missing"):
        identify(copy)


def test_a_text_encoder_config_of_before_transformers_5_is_read(copy: Path) -> None:
    path = copy / "text_encoder" / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    before = identify(copy).text_encoder
    flat = values | values["text_config"] | {"model_type": "qwen2_5_vl"}
    changed(copy, "text_encoder/config.json", **(flat | {"text_config": None}))
    assert identify(copy).text_encoder["hidden_size"] == before["hidden_size"]


# ---------------------------------------------------------------------------------------------------------------------
# Valid requests


def test_every_recommended_size_and_other_multiples_of_16_are_valid(specs: dict[str, ModelSpec]) -> None:
    spec = specs["qwen-image"]
    for width, height in (*ASPECT_RATIOS.values(), (16, 16), (1040, 4096)):
        validate(spec, complete(spec, width=width, height=height))


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"width": 1000}, "width", "the nearest are 992 and 1008"),
        ({"height": 8}, "height", "from 16 to 8192"),
        ({"num_frames": 5}, "num_frames", "Qwen-Image makes pictures"),
        ({"guidance_scale": 4.0}, "guidance_scale", "true_cfg_scale steers it"),
        ({"true_cfg_scale": -1.0}, "true_cfg_scale", "0.0 to 100.0"),
        ({"sampler": "unipc"}, "sampler", "euler"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1 to 1000"),
        ({"num_outputs_per_prompt": 99}, "num_outputs_per_prompt", "1 to 16"),
        ({"prompt": "a" * 20_001}, "prompt", "20000 characters"),
    ],
)
def test_wrong_parameters_are_named_with_the_nearest_right_ones(
    specs: dict[str, ModelSpec], changes: dict[str, Any], param: str, message: str
) -> None:
    spec = specs["qwen-image"]
    with pytest.raises(InvalidRequest, match=message) as caught:
        validate(spec, complete(spec, **changes))
    assert caught.value.param == param


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

SIZES = [(w, h) for w in (31, 64, 333, 1024, 1999, 4000) for h in (17, 200, 768, 1536, 3111)]


def test_sizes_of_pictures_are_those_of_the_reference() -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    reference: Any = pipeline_qwenimage_edit_plus
    dimensions = getattr(reference, "_dimensions", reference.calculate_dimensions)  # parity runs shrink the areas
    for size in SIZES:
        for area in (1024 * 1024, 384 * 384):
            assert fitted(size, area) == dimensions(area, size[0] / size[1])


@pytest.mark.parametrize("limits", [(56 * 56, 12845056), (56 * 56, 28 * 28 * 200), (512 * 512, 1024 * 1024)])
def test_tokens_of_a_picture_are_those_of_the_image_processor(limits: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for older in (False, True):
        named = {"min_pixels": limits[0], "max_pixels": limits[1]}
        patches = Patches.of(named if older else {"size": dict(zip(("shortest_edge", "longest_edge"), limits, strict=True))})  # fmt: skip  # noqa: E501
        for size in SIZES:
            width, height = fitted(size, 384 * 384)
            rows, columns = smart_resize(height, width, 28, *limits)
            assert patches.grid((width, height)) == (rows // 28, columns // 28)


def test_a_result_of_no_asked_size_has_the_shape_of_its_picture(specs: dict[str, ModelSpec]) -> None:
    """Of the first for -Edit, of the last for -2509 and -2511, as in the reference; a given side stays."""
    sizes = [(400, 300), (300, 600)]
    of_first, of_last = (size_of(specs[name], sizes) for name in ("qwen-image-edit", "qwen-image-edit-plus"))
    assert (of_first.width, of_first.height) == (1184, 896)
    assert (of_last.width, of_last.height) == (736, 1440)
    assert SamplingParams(width=512).merged_over(of_last).height == 1440
    assert size_of(specs["qwen-image"], []) == SamplingParams()


def test_a_server_of_the_default_limits_makes_results_in_the_shape_of_any_picture(specs: dict[str, ModelSpec]) -> None:
    for spec in specs.values():
        limit = most_pixels(spec)
        assert (spec.defaults.width or 0) * (spec.defaults.height or 0) <= limit
        for size in [(w, h) for w, h in (*SIZES, (6000, 100), (100, 6000)) if max(w, h) <= 60 * min(w, h)]:
            made = size_of(spec, [size]).merged_over(spec.defaults)
            validate(spec, made)
            assert (made.width or 0) * (made.height or 0) <= limit
            assert FAMILY.profile(spec, made).chunk_bytes <= frame_bytes(spec, limit)


def test_a_job_takes_its_size_from_its_picture_and_its_ids_count_the_pictures_tokens(
    specs: dict[str, ModelSpec], tmp_path: Path
) -> None:
    spec, path = specs["qwen-image-edit-plus"], tmp_path / "a.png"
    Image.new("RGB", (100, 140)).save(path)
    cases: tuple[tuple[dict[str, Any], tuple[int, int]], ...] = (
        ({}, (864, 1216)),
        ({"width": 512, "height": 256}, (512, 256)),
    )
    for given, size in cases:
        params = SamplingParams(prompt="red", image_path=(str(path),), **given)
        (job,) = check_jobs(spec, [("", params)], GenerateArgs())
        assert (job.params.width, job.params.height) == size
        tokenizer = load_tokenizer(spec.root, spec)
        request = request_of(tokenizer, job.params, job.media, tuple(picture.ref for picture in job.images))
        assert request.token_ids == tokenizer.encode_request("red", " ", ((100, 140),))


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.fixture(scope="module")
def tokenizers(roots: dict[str, Path], specs: dict[str, ModelSpec]) -> dict[str, QwenTokenizer]:
    return {name: load_tokenizer(root, specs[name]) for name, root in roots.items()}


def test_templates_are_those_of_the_reference() -> None:
    """Each stands in the source of its pipeline, whose instances alone have it as an attribute."""
    import inspect

    import diffusers

    for most, name in {0: "QwenImagePipeline", 1: "QwenImageEditPipeline", 3: "QwenImageEditPlusPipeline"}.items():
        source = inspect.getsource(getattr(diffusers, name))
        template = TEMPLATES[most]
        written = template.text("{}", 1 if most == 1 else 0).replace("\n", "\\n")
        assert f'"{written}"' in source
        assert f"prompt_template_encode_start_idx = {template.drop}" in source
        if most == 3:
            assert f'"{template.picture.format(number="{}")}"' in source


@pytest.mark.parametrize(
    "prompt", ["", " ", "a  cat\n\n", "猫 🐈 ﬁ", "<|im_end|> x", "it's 12 o'clock", "\u0301e", "a" * 300]
)
def test_ids_are_those_of_the_reference_tokenizer(
    roots: dict[str, Path], tokenizers: dict[str, QwenTokenizer], prompt: str
) -> None:
    from transformers import Qwen2Tokenizer

    theirs = Qwen2Tokenizer.from_pretrained(roots["qwen-image"] / "tokenizer")
    ours = tokenizers["qwen-image"]
    assert list(ours.encode(prompt)) == theirs(ours.template.text(prompt, 0)).input_ids


def test_a_long_prompt_is_cut_to_what_the_reference_reads(
    tokenizers: dict[str, QwenTokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    ids = tokenizers["qwen-image"].encode("cat, " * 600)
    assert len(ids) == 34 + 512
    assert "longer than 512 tokens" in caplog.text


def test_placeholders_are_as_many_as_the_pictures_tokens(tokenizers: dict[str, QwenTokenizer]) -> None:
    for name, most in (("qwen-image-edit", 1), ("qwen-image-edit-plus", 3)):
        made, sizes = tokenizers[name], ((640, 480), (100, 300), (50, 50))[:most]
        ids = made.encode_request("red", " ", sizes)
        assert made.patches is not None
        grids = [made.patches.grid(fitted(size, EDIT_RULES[most].seen_area)) for size in sizes]
        wanted = sum(rows * columns for rows, columns in grids)
        assert [each.count(made.placeholder) for each in ids.values()] == [wanted, wanted]


@pytest.mark.parametrize(
    ("prompt", "sizes", "message"),
    [
        (f"a {PLACEHOLDER} b", ((64, 64),), "must not hold"),
        ("cat " * 4000, ((64, 64),), f"at most {MAX_EDIT_TEXT} tokens"),
        ("red", ((5000, 20),), "200 times"),
        ("a \ud800", ((64, 64),), "lone surrogate"),
    ],
)
def test_prompts_that_cannot_be_are_refused(
    tokenizers: dict[str, QwenTokenizer], prompt: str, sizes: tuple[tuple[int, int], ...], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tokenizers["qwen-image-edit-plus"].encode_request(prompt, " ", sizes)


def test_a_tokenizer_without_the_templates_tokens_is_refused(copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.unlink()
    path.write_text(text.replace("<|image_pad|>", "<|image_spot|>"), encoding="utf-8")
    with pytest.raises(ModelError, match="has no token"):
        load_tokenizer(copy, replace(identify(copy)))


def test_the_registry_runs_all_three_pipelines() -> None:
    assert FAMILIES["qwen"].pipeline_classes == ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline")  # fmt: skip  # noqa: E501
