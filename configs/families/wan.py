"""Wan 2.1 text-to-video: variants, valid requests and costs.

Facts: the Wan 2.1 report and repository (sizes, guidance 5, for the 1.3B model 6, 16 frames per second, the negative
prompt), and diffusers' WanPipeline (sizes in multiples of 16, 4n + 1 frames, 512 text tokens).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safelight.configs.families.base import Family, ModelSpec, Variant
from safelight.configs.families.wan_costs import LATENT_CHANNELS, TEXT_TOKENS, profile
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import InvalidRequest, ModelError

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
SAMPLERS = ("unipc", "euler")
SAMPLER_OF_CLASS = MappingProxyType({"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"})
MAX_OUTPUTS, MAX_STEPS, MAX_GUIDANCE, MAX_FPS, MAX_SEED = 16, 1000, 100.0, 120, 2**62
MAX_PROMPT_CHARACTERS = 20_000

_PUBLISHED = SamplingParams(
    negative_prompt=NEGATIVE_PROMPT,
    height=480,
    width=832,
    num_frames=81,
    fps=16,
    num_inference_steps=50,
    guidance_scale=5.0,
    num_outputs_per_prompt=1,
    sampler="unipc",
)
_SMALL = SamplingParams(
    negative_prompt="",
    height=128,
    width=128,
    num_frames=1,
    fps=8,
    num_inference_steps=20,
    guidance_scale=4.0,
    num_outputs_per_prompt=1,
    sampler="unipc",
)
_TASK = "text-to-video"
_GUIDED_BY_6 = SamplingParams(guidance_scale=6.0).merged_over(_PUBLISHED)
BUILTIN = Variant("builtin", "", _TASK, _SMALL, "9M", "ships with Safelight; knows simple subjects only")
WAN_1_3B = Variant("Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _TASK, _GUIDED_BY_6, "1.3B")
WAN_14B = Variant("Wan2.1-T2V-14B", "Wan-AI/Wan2.1-T2V-14B-Diffusers", _TASK, _PUBLISHED, "14B")
CUSTOM = Variant("custom", "", _TASK, _PUBLISHED, "any", "any other checkpoint of the architecture")
_WIDTH_OF_SMALL = 1024  # a custom model narrower than this has the built-in model's defaults


def identify(index: Mapping[str, Any], root: Path) -> ModelSpec:
    """Which variant the directory `root` holds. `index` is its parsed model_index.json.

    Raises ModelError: a component's config is missing or cannot be read, or it is another Wan (2.2, image-to-video).
    """
    _refuse_other_tasks(index)
    transformer = _component(root, "transformer", "config.json", ("num_attention_heads", "attention_head_dim"))
    if transformer.get("image_dim") is not None or transformer.get("in_channels") != LATENT_CHANNELS:
        raise ModelError(
            f"{root} is not a text-to-video checkpoint: a transformer with {LATENT_CHANNELS} input channels and no "
            f"image_dim is needed, it has in_channels {transformer.get('in_channels')} and image_dim "
            f"{transformer.get('image_dim')} (image to video is not supported yet)",
            param="model_path",
        )
    vae = _component(root, "vae", "config.json", ("dim_mult",))
    if vae.get("z_dim", LATENT_CHANNELS) != LATENT_CHANNELS or vae.get("patch_size") is not None:
        raise ModelError(f"{root / 'vae'} is not the VAE of Wan 2.1 (Wan 2.2 is not supported yet)", param="model_path")
    text_encoder = _component(root, "text_encoder", "config.json", ("d_model", "num_layers"))
    sampler = _component(root, "scheduler", "scheduler_config.json", ("_class_name",))
    if text_encoder["d_model"] != transformer["text_dim"]:
        raise ModelError(
            f"{root}: the text encoder is {text_encoder['d_model']} wide, but the transformer reads "
            f"{transformer['text_dim']}; are they of one model?",
            param="model_path",
        )
    variant = _variant(transformer, root)
    name = SAMPLER_OF_CLASS.get(sampler["_class_name"], "unipc")
    defaults = SamplingParams(sampler=name).merged_over(variant.defaults)
    return ModelSpec("wan", variant.name, root, _TASK, defaults, transformer, vae, text_encoder, sampler)


def _refuse_other_tasks(index: Mapping[str, Any]) -> None:
    second = index.get("transformer_2")
    if index.get("boundary_ratio") is not None or (isinstance(second, list) and second[0] is not None):
        raise ModelError("this is Wan 2.2 with two transformers, which is not supported yet", param="model_path")
    if index.get("expand_timesteps"):
        raise ModelError("this is Wan 2.2 TI2V (expand_timesteps), which is not supported yet", param="model_path")


def _component(root: Path, folder: str, file: str, fields: tuple[str, ...]) -> dict[str, Any]:
    path = root / folder / file
    if not path.is_file():
        raise ModelError(f"{path} is missing; is {root} a complete diffusers-format checkpoint?", param="model_path")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}", param="model_path") from error
    if not isinstance(values, dict) or any(name not in values for name in fields):
        raise ModelError(f"{path} must be a JSON object with {', '.join(fields)}", param="model_path")
    return values


def _variant(transformer: Mapping[str, Any], root: Path) -> Variant:
    if (root / "vocabulary.json").is_file():
        return BUILTIN
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    published = {(1536, 30): WAN_1_3B, (5120, 40): WAN_14B}.get((width, transformer.get("num_layers", 40)))
    if published is not None:
        return published
    defaults = _SMALL if width < _WIDTH_OF_SMALL else _PUBLISHED
    return Variant(CUSTOM.name, "", _TASK, defaults, CUSTOM.parameters, CUSTOM.note)


def validate(spec: ModelSpec, params: SamplingParams) -> None:
    """Raises InvalidRequest naming the first wrong parameter and the nearest values that are right.

    `params` is complete: every field was filled from the defaults.
    """
    spatial, temporal = spec.vae.get("scale_factor_spatial", 8), spec.vae.get("scale_factor_temporal", 4)
    frames, rows, columns = spec.transformer.get("patch_size", (1, 2, 2))
    longest = spec.transformer.get("rope_max_seq_len", 1024)  # positions along each axis
    _grid("height", params.height, spatial * rows, 0, longest * spatial * rows)
    _grid("width", params.width, spatial * columns, 0, longest * spatial * columns)
    _grid("num_frames", params.num_frames, temporal * frames, 1, 1 + (longest * frames - 1) * temporal)
    _between("num_inference_steps", params.num_inference_steps, 1, MAX_STEPS)
    _between("guidance_scale", params.guidance_scale, 0.0, MAX_GUIDANCE)
    _between("fps", params.fps, 1, MAX_FPS)
    _between("num_outputs_per_prompt", params.num_outputs_per_prompt, 1, MAX_OUTPUTS)
    if params.seed is not None:
        _between("seed", params.seed, 0, MAX_SEED)
    if params.sampler not in SAMPLERS:
        raise InvalidRequest(f"sampler is one of {', '.join(SAMPLERS)}; got {params.sampler!r}", param="sampler")
    for name, text in (("prompt", params.prompt), ("negative_prompt", params.negative_prompt)):
        if text is not None and len(text) > MAX_PROMPT_CHARACTERS:
            raise InvalidRequest(
                f"{name} may have {MAX_PROMPT_CHARACTERS} characters (the model reads {TEXT_TOKENS} tokens); "
                f"got {len(text)}",
                param=name,
            )


def _grid(name: str, value: int | None, step: int, offset: int, most: int) -> None:
    """`value` must be step * n + offset with n >= 1 (n >= 0 when there is an offset), and at most `most`."""
    least = offset or step
    if type(value) is not int:
        raise InvalidRequest(f"{name} must be an integer; got {value!r}", param=name)
    rule = f"{name} must be a multiple of {step}" + (f" plus {offset}" if offset else "")
    if value < least or value > most:
        raise InvalidRequest(f"{rule}, from {least} to {most}; got {value}", param=name)
    if (value - offset) % step:
        below = (value - offset) // step * step + offset
        nearest = [v for v in (below, below + step) if least <= v <= most]
        raise InvalidRequest(f"{rule}; got {value}, the nearest are {' and '.join(map(str, nearest))}", param=name)


def _between(name: str, value: float | None, least: float, most: float) -> None:
    if value is None or isinstance(value, bool) or not math.isfinite(value) or not least <= value <= most:
        raise InvalidRequest(f"{name} must be from {least} to {most}; got {value!r}", param=name)
    if isinstance(least, int) and type(value) is not int:
        raise InvalidRequest(f"{name} must be an integer; got {value!r}", param=name)


FAMILY = Family(
    name="wan",
    pipeline_classes=("WanPipeline",),
    pipeline="safelight.runtime.models.wan.pipeline:load",
    tokenizer="safelight.runtime.text.t5:load_tokenizer",
    variants=(BUILTIN, WAN_1_3B, WAN_14B, CUSTOM),
    samplers=SAMPLERS,
    identify=identify,
    validate=validate,
    profile=profile,
)
