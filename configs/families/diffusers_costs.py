"""Rough costs of a request on any diffusers pipeline: parameters of each component x what it works through.

Cost unit: TFLOP. Only the proportions matter: the scheduler measures how long a unit takes. Bytes are upper bounds for
float32 activations with attention that keeps no scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from safelight.configs.families.base import ModelSpec
from safelight.configs.profile import BatchKey, JobProfile, Phase
from safelight.configs.sampling_params import SamplingParams

DENOISERS = ("transformer", "unet", "prior", "decoder")
_VAES = ("vae", "vqgan", "movq")
_BYTES_PER_PARAMETER = 2
_TEXT_TOKENS = 512
T = TypeVar("T")
_TERA = 1e12
_FLOAT = 4
_TEXT_BYTES = 64 << 20  # embeddings of several encoders
_ENCODE_PEAK = 256 << 20


def spatial_scale(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along a side."""
    for name in ("spatial_compression_ratio", "scale_factor_spatial"):
        if isinstance(vae.get(name), int):
            return int(vae[name])
    for name in ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels"):
        if isinstance(vae.get(name), list) and vae[name]:
            return int(2 ** (len(vae[name]) - 1))
    return 8


def _temporal_scale(vae: Mapping[str, Any]) -> int:
    for name in ("temporal_compression_ratio", "scale_factor_temporal"):
        if isinstance(vae.get(name), int):
            return max(1, int(vae[name]))
    return 1


def _channels(vae: Mapping[str, Any]) -> int:
    return next((int(vae[n]) for n in ("latent_channels", "z_dim") if isinstance(vae.get(n), int)), 4)


def _patch(denoiser: Mapping[str, Any]) -> int:
    """Latents per token along a side."""
    patch = denoiser.get("patch_size", 1)
    patch = patch[-1] if isinstance(patch, list | tuple) and patch else patch
    return patch if isinstance(patch, int) and patch > 0 else 1


def _width(denoiser: Mapping[str, Any]) -> int:
    heads, head = denoiser.get("num_attention_heads"), denoiser.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(head, int):
        return heads * head
    blocks = denoiser.get("block_out_channels")
    return max(blocks) if isinstance(blocks, list) and blocks else 2048


def _parameters(spec: ModelSpec, names: tuple[str, ...]) -> float:
    return sum(spec.weights.get(name, 0) for name in names) / _BYTES_PER_PARAMETER


def _given(value: T | None) -> T:
    assert value is not None, "profile needs complete parameters"
    return value


def profile(spec: ModelSpec, params: SamplingParams) -> JobProfile:
    """`params` is complete and valid. See the fields of JobProfile; the whole decoding is one chunk."""
    height, width, frames = _given(params.height), _given(params.width), _given(params.num_frames)
    scale = spatial_scale(spec.vae)
    shape = (
        _channels(spec.vae), (frames - 1) // _temporal_scale(spec.vae) + 1,
        max(1, height // scale), max(1, width // scale),
    )  # fmt: skip
    area = shape[1] * shape[2] * shape[3]
    tokens = max(1, area // _patch(spec.transformer) ** 2)
    guided = _given(params.guidance_scale) > 1.0
    branches = 2 if guided else 1
    encoders = tuple(name for name in spec.weights if name not in (*DENOISERS, *_VAES))
    step = 2 * branches * tokens * _parameters(spec, DENOISERS) / _TERA
    pixels = height * width * frames
    latent_bytes = _FLOAT * shape[0] * area
    vae_width = next((int(b[0]) for b in [spec.vae.get("block_out_channels")] if isinstance(b, list) and b), 128)
    return JobProfile(
        family=spec.family,
        latent_shape=shape,
        tokens=tokens,
        steps=_given(params.num_inference_steps),
        outputs=_given(params.num_outputs_per_prompt),
        phases=(Phase(0, spec.variant, BatchKey(spec.variant, shape, guided, 0), max(step, 1e-9)),),
        encode_cost=0.0,
        decode_chunk_cost=max(32 * area * _parameters(spec, _VAES) / _TERA, 1e-9),
        chunk_frames=(frames,),
        chunk_bytes=pixels * 3,
        conditioning_bytes=_TEXT_BYTES,
        state_bytes=16 * latent_bytes + 3 * pixels,
        encode_peak_bytes=_ENCODE_PEAK,
        step_peak_bytes=branches * 12 * _FLOAT * tokens * _width(spec.transformer),
        decode_peak_bytes=_FLOAT * (4 * vae_width * (pixels // frames) * min(frames, 8) + 6 * pixels),
        prepare_cost=max(2 * branches * _TEXT_TOKENS * _parameters(spec, encoders) / _TERA, 1e-9),
        resumable=False,
        batchable=False,
    )
