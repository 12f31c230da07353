"""FLUX.1 text-to-image: variants, valid requests and costs.

Facts: the model cards of FLUX.1-dev (guidance 3.5, 50 steps, 512 text tokens) and FLUX.1-schnell (4 steps, no
guidance, 256 text tokens), 1024x1024 each, and diffusers' FluxPipeline (sizes in multiples of 16, which it rounds to;
true classifier-free guidance off).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safelight.configs.families.base import Family, ModelSpec, Variant
from safelight.configs.families.components import read_component, read_settings
from safelight.configs.families.flux_costs import attention, encoder, profile, text_tokens
from safelight.configs.families.kl_costs import spatial_scale
from safelight.configs.families.limits import check_grid, check_one_picture, check_usual
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import InvalidRequest, ModelError, UnsupportedModel

SAMPLERS = ("euler",)
LARGEST = 8192  # pixels of a side: rotary positions go that far
_TASK = "text-to-image"
_DEV = SamplingParams(
    negative_prompt="",
    height=1024,
    width=1024,
    num_frames=1,
    fps=1,
    num_inference_steps=50,
    guidance_scale=3.5,
    num_outputs_per_prompt=1,
    sampler="euler",
    true_cfg_scale=1.0,
)
_SCHNELL = SamplingParams(num_inference_steps=4, guidance_scale=0.0).merged_over(_DEV)


def _published(guidance: bool) -> Mapping[str, Mapping[str, Any]]:
    """The component configs of a published checkpoint, as far as costs depend on them."""
    return {
        "transformer": {
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": guidance,
        },
        "vae": {"latent_channels": 16, "layers_per_block": 2, "block_out_channels": [128, 256, 512, 512]},
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 49408,
        },
        "text_encoder_2": {
            "d_model": 4096,
            "num_layers": 24,
            "num_heads": 64,
            "d_kv": 64,
            "d_ff": 10240,
            "vocab_size": 32128,
        },
    }


DEV = Variant("FLUX.1-dev", "black-forest-labs/FLUX.1-dev", _TASK, _DEV, "12B", configs=_published(True))
SCHNELL = Variant(
    "FLUX.1-schnell", "black-forest-labs/FLUX.1-schnell", _TASK, _SCHNELL, "12B", configs=_published(False)
)
CUSTOM = Variant("custom", "", _TASK, _DEV, "any", "any other checkpoint of the architecture")

# What each component config must say: the value of a field that may be absent (what its class takes then), or None
# for one that must be there.
_FIELDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "transformer": {
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
        },
        "vae": {"latent_channels": 4, "layers_per_block": 1, "block_out_channels": None},
        "text_encoder": {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "vocab_size": 49408,
        },
        "text_encoder_2": {
            "d_model": 512,
            "num_layers": 6,
            "num_heads": 8,
            "d_kv": 64,
            "d_ff": 2048,
            "vocab_size": 32128,
        },
    }
)
_LISTS = MappingProxyType({"block_out_channels": 0})


def identify(index: Mapping[str, Any], root: Path) -> ModelSpec:
    """Which variant the directory `root` holds. `index` is its parsed model_index.json.

    The spec's component configs have every field of `_FIELDS`. Raises ModelError: a config is missing, cannot be read
    or has a wrong field, or its components are not of one model.
    """
    parts: dict[str, Any] = {name: read_component(root, name, fields, _LISTS) for name, fields in _FIELDS.items()}
    transformer = parts["transformer"]
    guidance = transformer.setdefault("guidance_embeds", False)
    if not isinstance(guidance, bool):
        path = root / "transformer" / "config.json"
        raise ModelError(f"{path}: guidance_embeds must be true or false, got {guidance!r}", param="model_path")
    if transformer["in_channels"] != 4 * parts["vae"]["latent_channels"]:
        raise UnsupportedModel(
            f"{root} is not a text-to-image checkpoint: a transformer with 4 x {parts['vae']['latent_channels']} (the "
            f"VAE's latent channels) input channels is needed, it has {transformer['in_channels']}",
            param="model_path",
        )
    for name, width, field in (
        ("text_encoder", parts["text_encoder"]["hidden_size"], "pooled_projection_dim"),
        ("text_encoder_2", parts["text_encoder_2"]["d_model"], "joint_attention_dim"),
    ):
        if width != transformer[field]:
            raise ModelError(
                f"{root}: {name} is {width} wide, but the transformer reads {transformer[field]} ({field}); are they "
                "of one model?",
                param="model_path",
            )
    sampler = read_settings(root / "scheduler" / "scheduler_config.json")
    variant = _variant(transformer)
    return ModelSpec("flux", variant.name, root, _TASK, variant.defaults, sampler=sampler, **parts)


def _variant(transformer: Mapping[str, Any]) -> Variant:
    published = DEV if transformer["guidance_embeds"] else SCHNELL
    if all(transformer[name] == value for name, value in published.configs["transformer"].items()):
        return published
    return Variant(CUSTOM.name, "", _TASK, published.defaults, CUSTOM.parameters, CUSTOM.note)


def validate(spec: ModelSpec, params: SamplingParams) -> None:
    """Raises InvalidRequest naming the first wrong parameter and the nearest values that are right.

    `params` is complete: every field but the seed was filled from the defaults.
    """
    step = 2 * spatial_scale(spec.vae)
    check_grid("height", params.height, step, 0, LARGEST)
    check_grid("width", params.width, step, 0, LARGEST)
    check_one_picture(params, spec.variant)
    check_usual(params, SAMPLERS, text_tokens=text_tokens(spec))
    if not spec.transformer["guidance_embeds"] and (params.guidance_scale or 0.0) > 1.0:
        raise InvalidRequest(
            f"{spec.variant} was distilled to run without guidance_scale; leave it out (true_cfg_scale is another "
            "guidance, with a negative prompt)",
            param="guidance_scale",
        )
    if params.negative_prompt and not (params.true_cfg_scale or 0.0) > 1.0:
        raise InvalidRequest(
            f"negative_prompt needs true_cfg_scale above 1 (of {spec.variant} it is {params.true_cfg_scale}): without "
            "it nothing would keep away from it",
            param="negative_prompt",
        )


FAMILY = Family(
    name="flux",
    pipeline_classes=("FluxPipeline",),
    pipeline="safelight.runtime.models.flux.pipeline:load",
    tokenizer="safelight.runtime.text.flux:load_tokenizer",
    variants=(DEV, SCHNELL, CUSTOM),
    samplers=SAMPLERS,
    identify=identify,
    validate=validate,
    profile=profile,
    attention=attention,
    encoder=encoder,
)
