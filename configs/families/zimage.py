"""Z-Image and Z-Image-Turbo, text to image: variants, valid requests and costs.

Facts: the Z-Image report (arXiv 2511.22699) and model cards (1024x1024; Turbo without guidance and in 8 forwards,
Z-Image in 50 steps with a guidance of 3 to 5), and diffusers' ZImagePipeline (sizes in multiples of 16, guidance from
0 on, 512 tokens of text). Turbo's card says 9 steps, of which the last did nothing; the pipeline has since dropped that
one, so the same pictures take 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safelight.configs.families.base import Family, ModelSpec, Variant
from safelight.configs.families.components import read_component, read_settings
from safelight.configs.families.kl_costs import spatial_scale
from safelight.configs.families.limits import CFG_EXTRAS, check_grid, check_one_picture, check_usual
from safelight.configs.families.zimage_costs import (
    LATENT_CHANNELS,
    MOST_TEXT_TOKENS,
    PATCH,
    attention,
    encoder,
    profile,
)
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import InvalidRequest, ModelError, UnsupportedModel

SAMPLERS = ("euler",)
TURBO_SHIFT = 3.0  # of Turbo's schedule; the other checkpoint has 6

_TASK = "text-to-image"
_BASE = SamplingParams(
    negative_prompt="",
    height=1024,
    width=1024,
    num_frames=1,
    fps=16,
    num_inference_steps=50,
    guidance_scale=4.0,
    num_outputs_per_prompt=1,
    sampler="euler",
    cfg_normalization=0.0,
    cfg_truncation=1.0,
)
_TURBO = SamplingParams(num_inference_steps=8, guidance_scale=0.0).merged_over(_BASE)
_CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "transformer": {
            "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "in_channels": LATENT_CHANNELS,
            "cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
        },
        "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": LATENT_CHANNELS},
        "text_encoder": {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        },
    }
)  # fmt: skip
TURBO = Variant(
    "Z-Image-Turbo", "Tongyi-MAI/Z-Image-Turbo", _TASK, _TURBO, "6B", "distilled; takes no guidance", _CONFIGS
)
BASE = Variant("Z-Image", "Tongyi-MAI/Z-Image", _TASK, _BASE, "6B", configs=_CONFIGS)

# What each component config must say: the value of a field that may be absent (what its class takes then), or None
# for one that must be there.
_FIELDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "transformer": {
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "in_channels": LATENT_CHANNELS,
            "cap_feat_dim": 2560,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1024, 512, 512],
        },
        "vae": {"block_out_channels": None, "layers_per_block": 1, "latent_channels": 4},
        "text_encoder": {
            "hidden_size": None,
            "intermediate_size": None,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "head_dim": 128,
            "vocab_size": None,
        },
    }
)
_LISTS = MappingProxyType({"axes_dims": 3, "axes_lens": 3, "block_out_channels": 0})  # and how many they have; 0: any


def identify(index: Mapping[str, Any], root: Path) -> ModelSpec:
    """Which variant the directory `root` holds. `index` is its parsed model_index.json.

    The checkpoints are told apart by the shift of their schedules. The spec's component configs have every field of
    `_FIELDS`. Raises ModelError: a config is missing, cannot be read or has a wrong field, or it is another Z-Image.
    """
    transformer, vae, text_encoder = (read_component(root, name, fields, _LISTS) for name, fields in _FIELDS.items())
    if transformer.get("siglip_feat_dim") is not None:
        raise UnsupportedModel(f"{root} is a Z-Image that reads pictures, which is not supported", param="model_path")
    channels = transformer["in_channels"], vae["latent_channels"]
    if channels != (LATENT_CHANNELS, LATENT_CHANNELS):
        raise UnsupportedModel(
            f"{root}: {LATENT_CHANNELS} latent channels expected, the transformer has {channels[0]} and the VAE "
            f"{channels[1]}",
            param="model_path",
        )
    if text_encoder["hidden_size"] != transformer["cap_feat_dim"]:
        raise ModelError(
            f"{root}: the text encoder is {text_encoder['hidden_size']} wide, but the transformer reads "
            f"{transformer['cap_feat_dim']}; are they of one model?",
            param="model_path",
        )
    sampler = read_settings(root / "scheduler" / "scheduler_config.json")
    variant = TURBO if sampler.get("shift", 1.0) == TURBO_SHIFT else BASE
    return ModelSpec("zimage", variant.name, root, _TASK, variant.defaults, transformer, vae, text_encoder, sampler)


def validate(spec: ModelSpec, params: SamplingParams) -> None:
    """Raises InvalidRequest naming the first wrong parameter and the nearest values that are right.

    `params` is complete: every field but the seed was filled from the defaults.
    """
    step = spatial_scale(spec.vae) * PATCH
    _, rows, columns = spec.transformer["axes_lens"]
    check_grid("height", params.height, step, 0, rows * step)
    check_grid("width", params.width, step, 0, columns * step)
    check_one_picture(params, spec.variant)
    if params.true_cfg_scale is not None:
        raise InvalidRequest("Z-Image is steered by guidance_scale; leave true_cfg_scale out", param="true_cfg_scale")
    if params.guidance_scale == 0:
        _refuse_what_guides(params, spec.variant)
    check_usual(params, SAMPLERS, text_tokens=MOST_TEXT_TOKENS, takes=CFG_EXTRAS)


def _refuse_what_guides(params: SamplingParams, model: str) -> None:
    """Raises InvalidRequest for a setting that would be ignored."""
    for name, neutral in (("negative_prompt", ""), ("cfg_normalization", 0.0), ("cfg_truncation", 1.0)):
        if getattr(params, name) not in (neutral, None):
            raise InvalidRequest(
                f"{name} does nothing without guidance, and guidance_scale is 0 ({model}); leave it out, or set "
                "guidance_scale",
                param=name,
            )


FAMILY = Family(
    name="zimage",
    pipeline_classes=("ZImagePipeline",),
    pipeline="safelight.runtime.models.zimage.pipeline:load",
    tokenizer="safelight.runtime.text.zimage:load_tokenizer",
    variants=(TURBO, BASE),
    samplers=SAMPLERS,
    identify=identify,
    validate=validate,
    profile=profile,
    attention=attention,
    encoder=encoder,
)
