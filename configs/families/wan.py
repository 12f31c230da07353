"""Wan 2.1 text-to-video: variants, valid requests and costs.

Facts: the Wan 2.1 report and repository (sizes, guidance 5, for the 1.3B model 6, 16 frames per second, the negative
prompt), and diffusers' WanPipeline (sizes in multiples of 16, 4n + 1 frames, 512 text tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safelight.configs.families.base import Family, ModelSpec, Variant
from safelight.configs.families.components import read_component, read_settings
from safelight.configs.families.limits import check_grid, check_usual
from safelight.configs.families.wan_costs import LATENT_CHANNELS, TEXT_TOKENS, attention, encoder, profile
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import InvalidRequest, ModelError, UnsupportedModel

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
SAMPLERS = ("unipc", "euler")
SAMPLER_OF_CLASS = MappingProxyType({"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"})

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


def _published(heads: int, layers: int, ffn_dim: int) -> Mapping[str, Mapping[str, Any]]:
    """The component configs of a published checkpoint, as far as costs depend on them."""
    transformer = {"num_attention_heads": heads, "attention_head_dim": 128, "num_layers": layers, "ffn_dim": ffn_dim}
    vae = {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    return {
        "transformer": transformer | {"text_dim": 4096, "patch_size": [1, 2, 2]},
        "vae": vae | {"scale_factor_spatial": 8, "scale_factor_temporal": 4},
        "text_encoder": {"d_model": 4096, "num_layers": 24, "num_heads": 64, "d_kv": 64, "d_ff": 10240}
        | {"vocab_size": 256384},
    }


WAN_1_3B = Variant(
    "Wan2.1-T2V-1.3B",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    _TASK,
    _GUIDED_BY_6,
    "1.3B",
    configs=_published(12, 30, 8960),
)
WAN_14B = Variant(
    "Wan2.1-T2V-14B", "Wan-AI/Wan2.1-T2V-14B-Diffusers", _TASK, _PUBLISHED, "14B", configs=_published(40, 40, 13824)
)
CUSTOM = Variant("custom", "", _TASK, _PUBLISHED, "any", "any other checkpoint of the architecture")
_WIDTH_OF_SMALL = 1024  # a custom model narrower than this has the built-in model's defaults


# What each component config must say: the value of a field that may be absent (what its class takes then), or None
# for one that must be there.
_FIELDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "transformer": {
            "num_attention_heads": None,
            "attention_head_dim": None,
            "num_layers": None,
            "ffn_dim": None,
            "in_channels": None,
            "text_dim": None,
            "rope_max_seq_len": 1024,
            "patch_size": [1, 2, 2],
        },
        "vae": {
            "dim_mult": None,
            "base_dim": 96,
            "num_res_blocks": 2,
            "z_dim": 16,
            "scale_factor_spatial": 8,
            "scale_factor_temporal": 4,
        },
        "text_encoder": {
            "d_model": None,
            "num_layers": None,
            "num_heads": 6,
            "d_kv": 64,
            "d_ff": 1024,
            "vocab_size": 250112,
        },
    }
)
_LISTS = MappingProxyType({"dim_mult": 4, "patch_size": 3})  # and how many they have


def identify(index: Mapping[str, Any], root: Path) -> ModelSpec:
    """Which variant the directory `root` holds. `index` is its parsed model_index.json.

    The spec's component configs have every field of `_FIELDS`. Raises ModelError: a config is missing, cannot be read
    or has a wrong field, or it is another Wan (2.2, image to video).
    """
    _refuse_other_tasks(index)
    transformer, vae, text_encoder = (read_component(root, name, fields, _LISTS) for name, fields in _FIELDS.items())
    if transformer.get("image_dim") is not None or transformer["in_channels"] != LATENT_CHANNELS:
        raise UnsupportedModel(
            f"{root} is not a text-to-video checkpoint: a transformer with {LATENT_CHANNELS} input channels and no "
            f"image_dim is needed, it has in_channels {transformer['in_channels']} and image_dim "
            f"{transformer.get('image_dim')} (image to video is not supported yet)",
            param="model_path",
        )
    upsampling = vae.setdefault("temperal_downsample", [False, True, True])
    if vae["z_dim"] != LATENT_CHANNELS or vae.get("patch_size") is not None or upsampling != [False, True, True]:
        raise UnsupportedModel(
            f"{root / 'vae'} is not the VAE of Wan 2.1 (Wan 2.2 is not supported yet)", param="model_path"
        )
    if text_encoder["d_model"] != transformer["text_dim"]:
        raise ModelError(
            f"{root}: the text encoder is {text_encoder['d_model']} wide, but the transformer reads "
            f"{transformer['text_dim']}; are they of one model?",
            param="model_path",
        )
    sampler = read_settings(root / "scheduler" / "scheduler_config.json")
    variant = _variant(transformer, root)
    name = SAMPLER_OF_CLASS.get(str(sampler.get("_class_name")), "unipc")
    defaults = SamplingParams(sampler=name).merged_over(variant.defaults)
    return ModelSpec("wan", variant.name, root, _TASK, defaults, transformer, vae, text_encoder, sampler)


def _refuse_other_tasks(index: Mapping[str, Any]) -> None:
    second = index.get("transformer_2")
    if index.get("boundary_ratio") is not None or (isinstance(second, list) and second and second[0] is not None):
        raise UnsupportedModel("this is Wan 2.2 with two transformers, which is not supported yet", param="model_path")
    if index.get("expand_timesteps"):
        raise UnsupportedModel(
            "this is Wan 2.2 TI2V (expand_timesteps), which is not supported yet", param="model_path"
        )


def _variant(transformer: Mapping[str, Any], root: Path) -> Variant:
    if (root / "vocabulary.json").is_file():
        return BUILTIN
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    published = {(1536, 30): WAN_1_3B, (5120, 40): WAN_14B}.get((width, transformer["num_layers"]))
    if published is not None:
        return published
    defaults = _SMALL if width < _WIDTH_OF_SMALL else _PUBLISHED
    return Variant(CUSTOM.name, "", _TASK, defaults, CUSTOM.parameters, CUSTOM.note)


def validate(spec: ModelSpec, params: SamplingParams) -> None:
    """Raises InvalidRequest naming the first wrong parameter and the nearest values that are right.

    `params` is complete: every field but the seed was filled from the defaults.
    """
    spatial, temporal = spec.vae["scale_factor_spatial"], spec.vae["scale_factor_temporal"]
    frames, rows, columns = spec.transformer["patch_size"]
    longest = spec.transformer["rope_max_seq_len"]  # positions along each axis
    check_grid("height", params.height, spatial * rows, 0, longest * spatial * rows)
    check_grid("width", params.width, spatial * columns, 0, longest * spatial * columns)
    check_grid("num_frames", params.num_frames, temporal * frames, 1, 1 + (longest * frames - 1) * temporal)
    if params.true_cfg_scale is not None:
        raise InvalidRequest("Wan takes no true_cfg_scale: guidance_scale is its guidance", param="true_cfg_scale")
    check_usual(params, SAMPLERS, text_tokens=TEXT_TOKENS)


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
    attention=attention,
    encoder=encoder,
)
