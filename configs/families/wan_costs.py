"""What a Wan request costs: the JobProfile, from the component configs alone.

Cost unit: TFLOP, a multiply-add counted as two. S tokens, T text tokens, E width of the transformer, f of its
feed-forward layer, L layers. Bytes assume float32 activations, so half of them are spare in bfloat16: an estimate that
is too low ends a worker group, one that is too high delays a job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from safelight.configs.encoder_parallel import EncoderShape
from safelight.configs.families.base import AttentionShape, ModelSpec
from safelight.configs.profile import BatchKey, JobProfile, Phase
from safelight.configs.sampling_params import SamplingParams

LATENT_CHANNELS = 16
TEXT_TOKENS = 512  # prompts are zero-padded to this length, and the zeros are attended to
WEIGHTS_ID = "transformer"
_BYTES = 4
_TERA = 1e12
T = TypeVar("T")


def profile(spec: ModelSpec, params: SamplingParams) -> JobProfile:
    """`params` is complete and valid. See the fields of JobProfile."""
    height, width, frames = _given(params.height), _given(params.width), _given(params.num_frames)
    spatial, temporal = spec.vae["scale_factor_spatial"], spec.vae["scale_factor_temporal"]
    shape = (LATENT_CHANNELS, (frames - 1) // temporal + 1, height // spatial, width // spatial)
    patch = spec.transformer["patch_size"]
    tokens = (shape[1] // patch[0]) * (shape[2] // patch[1]) * (shape[3] // patch[2])
    guided = _given(params.guidance_scale) > 1.0
    branches = 2 if guided else 1
    latent_bytes = _BYTES * shape[0] * shape[1] * shape[2] * shape[3]
    text_bytes = _BYTES * TEXT_TOKENS * int(spec.transformer["text_dim"]) * branches
    chunks = (1,) + (temporal,) * (shape[1] - 1)
    decode = decode_frame(spec.vae, shape[2], shape[3], max(chunks))
    key = BatchKey(WEIGHTS_ID, shape, guided, TEXT_TOKENS)
    return JobProfile(
        family=spec.family,
        latent_shape=shape,
        tokens=tokens,
        steps=_given(params.num_inference_steps),
        outputs=_given(params.num_outputs_per_prompt),
        phases=(Phase(0, WEIGHTS_ID, key, branches * _forward_flop(spec.transformer, tokens) / _TERA),),
        encode_cost=branches * _encode_flop(spec) / _TERA,
        decode_chunk_cost=decode.flop / _TERA,
        chunk_frames=chunks,
        chunk_bytes=max(chunks) * height * width * 3,
        conditioning_bytes=text_bytes,
        # UniPC holds the latents, two predictions and the sample before the last step, Euler one prediction
        state_bytes=latent_bytes * (4 if params.sampler == "unipc" else 2),
        encode_peak_bytes=text_bytes + branches * _encode_peak_bytes(spec.text_encoder),
        step_peak_bytes=branches * _forward_peak_bytes(spec.transformer, tokens) + 8 * latent_bytes,
        decode_peak_bytes=decode.peak_bytes + 2 * decode.cache_bytes,
    )


def attention(spec: ModelSpec) -> AttentionShape:
    """Text is attended to apart (cross-attention)."""
    c = {name: int(spec.transformer[name]) for name in ("num_attention_heads", "attention_head_dim", "num_layers")}
    return AttentionShape(c["num_attention_heads"], c["attention_head_dim"], c["num_layers"])


def encoder(spec: ModelSpec) -> EncoderShape:
    """The UMT5 encoder's numbers, for sharing it between ranks."""
    c = {name: int(spec.text_encoder[name]) for name in ("num_layers", "num_heads", "d_model", "d_kv", "d_ff")}
    return EncoderShape(
        layers=c["num_layers"],
        heads=c["num_heads"],
        width=c["d_model"],
        inner=c["num_heads"] * c["d_kv"],
        d_ff=c["d_ff"],
        vocabulary=int(spec.text_encoder["vocab_size"]),
    )


def _given(value: T | None) -> T:
    assert value is not None, "profile needs complete parameters"
    return value


def _width(transformer: Mapping[str, Any]) -> int:
    return int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"])


def _forward_flop(transformer: Mapping[str, Any], s: int) -> float:
    """L * (8SE^2 + 4S^2E [self] + 4SE^2 + 4TE^2 + 4STE [cross] + 4SEf) + text and patch embeddings."""
    e, f, t = _width(transformer), int(transformer["ffn_dim"]), TEXT_TOKENS
    block = 12 * s * e * e + 4 * s * s * e + 4 * t * e * e + 4 * s * t * e + 4 * s * e * f
    text = 2 * t * e * (int(transformer["text_dim"]) + e)
    return float(int(transformer["num_layers"]) * block + text + 2 * s * e * 8 * LATENT_CHANNELS)


def _forward_peak_bytes(transformer: Mapping[str, Any], s: int) -> int:
    """The feed-forward layer's input and output of width f, and eight tensors of width E (x, q, k, v, rotated, ...)."""
    return _BYTES * s * (2 * int(transformer["ffn_dim"]) + 8 * _width(transformer))


def _encode_flop(spec: ModelSpec) -> float:
    """T tokens through projections of width heads * d_kv and a gated feed-forward layer; attention scores are small."""
    return 2.0 * TEXT_TOKENS * encoder(spec).layer_weights


def _encode_peak_bytes(encoder: Mapping[str, Any]) -> int:
    """Scores and probabilities of all heads, and the three feed-forward tensors."""
    heads, d_ff = int(encoder["num_heads"]), int(encoder["d_ff"])
    return _BYTES * TEXT_TOKENS * (3 * heads * TEXT_TOKENS + 3 * d_ff + 4 * int(encoder["d_model"]))


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """`cache_bytes`: what a cursor holds between two frames."""

    flop: float
    peak_bytes: int
    cache_bytes: int


def decode_frame(vae: Mapping[str, Any], h: int, w: int, frames: int) -> DecodeCost:
    """One latent frame (h, w) that becomes `frames` frames, through the levels of a decoder of Wan 2.1's architecture.

    FLOP: 2 * 27 * C_in * C_out per voxel of each 3x3x3 convolution, two in a residual block; upsampling convolutions
    on top. Bytes: six activations of the largest level; the feature cache is two frames before each 3x3x3 convolution
    (of a video it is there twice, in the cursor that came in and the one that goes out).
    """
    channels = int(vae.get("z_dim", LATENT_CHANNELS))
    base = int(vae.get("decoder_base_dim") or vae["base_dim"])
    multipliers, blocks = list(vae["dim_mult"]), int(vae["num_res_blocks"])
    upsample_time = list(reversed(vae["temperal_downsample"]))
    widths = [base * m for m in (multipliers[-1], *reversed(multipliers))]
    time, area = 1, h * w
    flop = 54.0 * area * widths[0] * (channels + 4 * widths[0])
    cached, largest = 2 * area * (channels + 4 * widths[0]), area * widths[0]
    for level, (source, target) in enumerate(pairwise(widths)):
        source = source if level == 0 else source // 2
        voxels = time * area
        flop += 54.0 * voxels * (source * target + (2 * blocks + 1) * target * target)
        cached += 2 * area * (source + (2 * blocks + 1) * target)
        largest = max(largest, voxels * max(source, target))
        if level == len(multipliers) - 1:
            flop += 54.0 * voxels * target * 3
            cached += 2 * area * target
            break
        if upsample_time[level]:
            flop += 12.0 * voxels * target * target
            cached += 2 * area * target
            time = min(2 * time, frames)
        area *= 4
        flop += 9.0 * time * area * target * target
        largest = max(largest, time * area * target)
    return DecodeCost(flop, _BYTES * 6 * largest, _BYTES * cached)
