"""Qwen-Image and Qwen-Image-Edit: variants, valid requests and costs.

Facts: the Qwen-Image report (arXiv 2508.02324) and the model cards of Qwen-Image, -2512, -Edit, -Edit-2509 and
-Edit-2511 (steps, guidance 4, negative prompts, sizes by aspect ratio); diffusers' QwenImagePipeline,
QwenImageEditPipeline and QwenImageEditPlusPipeline (sizes in multiples of 16, a result in the shape of the picture).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safelight.configs.families.base import Family, ModelSpec, Variant
from safelight.configs.families.components import read_component, read_settings
from safelight.configs.families.limits import check_grid, check_one_picture, check_usual
from safelight.configs.families.qwen_costs import MAX_EDIT_TEXT, MAX_TEXT, PATCH, SPATIAL, attention, encoder, profile
from safelight.configs.families.qwen_pictures import EDIT_RULES, fitted
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import InvalidRequest, ModelError, UnsupportedModel

SAMPLERS = ("euler",)
NEGATIVE_PROMPT_2512 = (
    "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。构图混乱。"
    "文字模糊，扭曲。"
)
# What the model cards recommend, (width, height); any other size in multiples of 16 is taken, too.
ASPECT_RATIOS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "1:1": (1328, 1328), "16:9": (1664, 928), "9:16": (928, 1664), "4:3": (1472, 1104), "3:4": (1104, 1472),
        "3:2": (1584, 1056), "2:3": (1056, 1584),
    }
)  # fmt: skip
LARGEST = 8192  # pixels of a side; rotary positions go further
_CREATES, _EDITS = "text-to-image", "image-edit"
_WIDTH_OF_SMALL = 1024  # a custom transformer narrower than this is a test's, and makes small pictures

_PUBLISHED = SamplingParams(
    negative_prompt=" ",
    height=1328,
    width=1328,
    num_frames=1,
    fps=1,
    num_inference_steps=50,
    guidance_scale=1.0,
    true_cfg_scale=4.0,
    num_outputs_per_prompt=1,
    sampler="euler",
)
_SMALL = SamplingParams(height=128, width=128)
_FEW_STEPS = SamplingParams(num_inference_steps=20)
_EDITING = SamplingParams(height=1024, width=1024).merged_over(_PUBLISHED)
_EDITING_PLUS = SamplingParams(num_inference_steps=40).merged_over(_EDITING)

_CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "transformer": {
            "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 60, "joint_attention_dim": 3584,
            "in_channels": 64, "out_channels": 16, "patch_size": 2,
        },
        "vae": {
            "base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_dim": 16,
            "temperal_downsample": [False, True, True],
        },
        "text_encoder": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064,
            "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
        },
    }
)  # fmt: skip
_PIXELS = {"size": {"shortest_edge": 56 * 56, "longest_edge": 12845056}}
_SIZE = "20B"
# By pipeline class: least and most pictures of a request.
PICTURES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"QwenImagePipeline": (0, 0), "QwenImageEditPipeline": (1, 1), "QwenImageEditPlusPipeline": (1, 3)}
)


def _edits(pipeline: str) -> Mapping[str, Any]:
    """What planning without files knows of a published edit model."""
    return {**_CONFIGS, "processor": _PIXELS, "images": PICTURES[pipeline]}


QWEN_IMAGE = Variant("Qwen-Image", "Qwen/Qwen-Image", _CREATES, _PUBLISHED, _SIZE, configs=_CONFIGS)
QWEN_IMAGE_2512 = Variant(
    "Qwen-Image-2512",
    "Qwen/Qwen-Image-2512",
    _CREATES,
    SamplingParams(negative_prompt=NEGATIVE_PROMPT_2512).merged_over(_PUBLISHED),
    _SIZE,
    "known by 2512 in its directory's path: its files have the settings of Qwen-Image",
    configs=_CONFIGS,
)
EDIT = Variant(
    "Qwen-Image-Edit", "Qwen/Qwen-Image-Edit", _EDITS, _EDITING, _SIZE, "one picture",
    configs=_edits("QwenImageEditPipeline"),
)  # fmt: skip
EDIT_2509 = Variant(
    "Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2509", _EDITS, _EDITING_PLUS, _SIZE, "1 to 3 pictures",
    configs=_edits("QwenImageEditPlusPipeline"),
)  # fmt: skip
EDIT_2511 = Variant(
    "Qwen-Image-Edit-2511", "Qwen/Qwen-Image-Edit-2511", _EDITS, _EDITING_PLUS, _SIZE, "1 to 3 pictures",
    configs=_edits("QwenImageEditPlusPipeline"),
)  # fmt: skip

# Fields of component configs: the value of one that may be absent (what its class takes then), None: must be there.
_TRANSFORMER: Mapping[str, Any] = MappingProxyType(dict(_CONFIGS["transformer"]))
_VAE: Mapping[str, Any] = MappingProxyType(
    {name: value for name, value in _CONFIGS["vae"].items() if name != "temperal_downsample"}
)
_LANGUAGE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size",
)  # fmt: skip
_RELATIVES = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")  # Qwen-Image-Layered and the like


def identify(index: Mapping[str, Any], root: Path) -> ModelSpec:
    """Which variant the directory `root` holds. `index` is its parsed model_index.json.

    Raises ModelError: a config is missing, cannot be read or has a wrong field; UnsupportedModel for a relative.
    """
    transformer = read_component(root, "transformer", _TRANSFORMER)
    vae = read_component(root, "vae", _VAE, {"dim_mult": 4})
    for name in _RELATIVES:
        if transformer.get(name):
            raise UnsupportedModel(f"a Qwen transformer with {name} is not supported", param="model_path")
    if vae.setdefault("temperal_downsample", [False, True, True]) != [False, True, True]:
        raise UnsupportedModel(f"{root / 'vae'} is not the VAE of Qwen-Image", param="model_path")
    if transformer["in_channels"] != PATCH**2 * vae["z_dim"]:
        raise ModelError(
            f"{root}: the transformer reads {transformer['in_channels']} channels, but {PATCH**2} latents of the VAE "
            f"have {PATCH**2 * vae['z_dim']}; are they of one model?",
            param="model_path",
        )
    text_encoder = _text_encoder(root)
    if text_encoder["hidden_size"] != transformer["joint_attention_dim"]:
        raise ModelError(
            f"{root}: the text encoder is {text_encoder['hidden_size']} wide, but the transformer reads "
            f"{transformer['joint_attention_dim']}; are they of one model?",
            param="model_path",
        )
    pictures = PICTURES[str(index["_class_name"])]
    processor = read_settings(root / "processor" / "preprocessor_config.json") if pictures[1] else {}
    sampler = read_settings(root / "scheduler" / "scheduler_config.json")
    variant = _variant(pictures[1], transformer, root)
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    defaults = variant.defaults
    if width < _WIDTH_OF_SMALL:
        defaults = _FEW_STEPS.merged_over(defaults)
        defaults = defaults if pictures[1] else _SMALL.merged_over(defaults)  # edits have the size of their picture
    return ModelSpec(
        "qwen", variant.name, root, variant.task, defaults, transformer, vae, text_encoder, sampler=sampler,
        processor=processor, images=pictures,
    )  # fmt: skip


def _text_encoder(root: Path) -> dict[str, Any]:
    """The language model's numbers on top, as in files of before transformers 5, and `vision_config`."""
    path = root / "text_encoder" / "config.json"
    values = read_settings(path)
    values = values | dict(values.get("text_config") or {})
    for name in _LANGUAGE:
        if type(values.get(name)) is not int or values[name] < 1:
            raise ModelError(f"{path}: {name} must be a positive integer, got {values.get(name)!r}", param="model_path")
    values["vision_config"] = dict(_CONFIGS["text_encoder"]["vision_config"]) | dict(values.get("vision_config") or {})
    return values


def _variant(most: int, transformer: Mapping[str, Any], root: Path) -> Variant:
    if most == 0:
        return QWEN_IMAGE_2512 if "2512" in root.as_posix() else QWEN_IMAGE
    if most == 1:
        return EDIT
    return EDIT_2511 if transformer.get("zero_cond_t") else EDIT_2509


def size_of(spec: ModelSpec, sizes: Sequence[tuple[int, int]]) -> SamplingParams:
    """As the reference: about 1024x1024 pixels in the shape of the first picture (-Edit) or the last (-Edit-2509)."""
    if not sizes or not spec.images[1]:
        return SamplingParams()
    rule = EDIT_RULES[spec.images[1]]
    width, height = fitted(sizes[rule.sized_by], rule.kept_area)
    return SamplingParams(width=width, height=height)


def validate(spec: ModelSpec, params: SamplingParams) -> None:
    """Raises InvalidRequest naming the first wrong parameter and the nearest values that are right.

    `params` is complete: every field but the seed was filled from the defaults.
    """
    check_grid("height", params.height, SPATIAL * PATCH, 0, LARGEST)
    check_grid("width", params.width, SPATIAL * PATCH, 0, LARGEST)
    check_one_picture(params, spec.variant)
    if params.guidance_scale != 1.0:
        raise InvalidRequest(
            f"guidance_scale must stay 1: {spec.variant} is not distilled for guidance, true_cfg_scale steers it; got "
            f"{params.guidance_scale!r}",
            param="guidance_scale",
        )
    check_usual(params, SAMPLERS, text_tokens=MAX_EDIT_TEXT if spec.images[1] else MAX_TEXT)


FAMILY = Family(
    name="qwen",
    pipeline_classes=tuple(PICTURES),
    pipeline="safelight.runtime.models.qwen.pipeline:load",
    tokenizer="safelight.runtime.text.qwen:load_tokenizer",
    variants=(QWEN_IMAGE, QWEN_IMAGE_2512, EDIT, EDIT_2509, EDIT_2511),
    samplers=SAMPLERS,
    identify=identify,
    validate=validate,
    profile=profile,
    attention=attention,
    encoder=encoder,
    size_of=size_of,
)
