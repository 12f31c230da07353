"""What a FLUX.1 request costs: the JobProfile, from the component configs alone.

Cost unit: TFLOP, a multiply-add counted as two. S image tokens, T text tokens, E width of the transformer, L its
double-stream and M its single-stream blocks. Bytes assume float32 activations, so half of them are spare in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from safelight.configs.encoder_parallel import EncoderShape
from safelight.configs.families.base import AttentionShape, ModelSpec
from safelight.configs.families.kl_costs import decode_cost, spatial_scale
from safelight.configs.profile import BatchKey, JobProfile, Phase
from safelight.configs.sampling_params import SamplingParams

WEIGHTS_ID = "transformer"
CLIP_TOKENS = 77
_BYTES = 4
_TERA = 1e12
T = TypeVar("T")


def text_tokens(spec: ModelSpec) -> int:
    """What every prompt is padded to; the padding is attended to. schnell, which has no guidance, was made for half."""
    return 512 if spec.transformer["guidance_embeds"] else 256


def profile(spec: ModelSpec, params: SamplingParams) -> JobProfile:
    """`params` is complete and valid. See the fields of JobProfile."""
    height, width, scale = _given(params.height), _given(params.width), spatial_scale(spec.vae)
    shape = (int(spec.vae["latent_channels"]), 1, height // scale, width // scale)
    tokens, text = (shape[2] // 2) * (shape[3] // 2), text_tokens(spec)
    guided = _given(params.true_cfg_scale) > 1.0
    branches = 2 if guided else 1
    latent_bytes = _BYTES * shape[0] * shape[2] * shape[3]
    c = spec.transformer
    text_bytes = _BYTES * (text * int(c["joint_attention_dim"]) + int(c["pooled_projection_dim"])) * branches
    decode = decode_cost(spec.vae, shape[2], shape[3])
    key = BatchKey(WEIGHTS_ID, shape, guided, text)
    return JobProfile(
        family=spec.family,
        latent_shape=shape,
        tokens=tokens,
        steps=_given(params.num_inference_steps),
        outputs=_given(params.num_outputs_per_prompt),
        phases=(Phase(0, WEIGHTS_ID, key, branches * _forward_flop(c, tokens, text) / _TERA),),
        encode_cost=branches * (_t5_flop(spec, text) + _clip_flop(spec.text_encoder)) / _TERA,
        decode_chunk_cost=decode.flop / _TERA,
        chunk_frames=(1,),
        chunk_bytes=height * width * 3,
        conditioning_bytes=text_bytes,
        state_bytes=latent_bytes,
        encode_peak_bytes=text_bytes + branches * _t5_peak_bytes(spec.text_encoder_2, text),
        step_peak_bytes=branches * _forward_peak_bytes(c, tokens + text) + 8 * latent_bytes,
        decode_peak_bytes=decode.peak_bytes,
    )


def attention(spec: ModelSpec) -> AttentionShape:
    """Text and image tokens attend to each other in every block."""
    c = {name: int(value) for name, value in spec.transformer.items() if isinstance(value, int)}
    heads, dim, layers = c["num_attention_heads"], c["attention_head_dim"], c["num_layers"] + c["num_single_layers"]
    return AttentionShape(heads, dim, layers, text_tokens(spec), 12 * (heads * dim) ** 2 * c["num_layers"])


def encoder(spec: ModelSpec) -> EncoderShape:
    """The T5 encoder's numbers, for sharing it between ranks; CLIP is small and whole on each."""
    c = {name: int(spec.text_encoder_2[name]) for name in ("num_layers", "num_heads", "d_model", "d_kv", "d_ff")}
    return EncoderShape(
        layers=c["num_layers"],
        heads=c["num_heads"],
        width=c["d_model"],
        inner=c["num_heads"] * c["d_kv"],
        d_ff=c["d_ff"],
        vocabulary=int(spec.text_encoder_2["vocab_size"]),
        tokens=text_tokens(spec),
        prompts=1,
    )


def _given(value: T | None) -> T:
    assert value is not None, "profile needs complete parameters"
    return value


def _width(transformer: Mapping[str, Any]) -> int:
    return int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"])


def _forward_flop(transformer: Mapping[str, Any], s: int, t: int) -> float:
    """(L + M) * (24 (S + T) E^2 + 4 (S + T)^2 E) + 24 L E^2 + 6 M E^2 [modulation] + embeddings and projection."""
    e, double, single = _width(transformer), int(transformer["num_layers"]), int(transformer["num_single_layers"])
    block = 24 * (s + t) * e * e + 4 * (s + t) ** 2 * e
    modulation = 24 * double * e * e + 6 * single * e * e
    embedded = 4 * s * e * int(transformer["in_channels"]) + 2 * t * e * int(transformer["joint_attention_dim"])
    return float((double + single) * block + modulation + embedded)


def _forward_peak_bytes(transformer: Mapping[str, Any], tokens: int) -> int:
    """A single-stream block: q, k, v and hidden (7 E), normed q and k (2 E), what `down` reads (5 E), x and its normed
    copy, the result of attention and of `down`."""
    return _BYTES * tokens * 18 * _width(transformer)


def _t5_flop(spec: ModelSpec, t: int) -> float:
    """T tokens through projections of width heads * d_kv and a gated feed-forward layer, and over each other."""
    shape = encoder(spec)
    return 2.0 * t * shape.layer_weights + shape.layers * 4.0 * t * t * shape.inner


def _clip_flop(encoder: Mapping[str, Any]) -> float:
    width, inner = int(encoder["hidden_size"]), int(encoder["intermediate_size"])
    return 2.0 * CLIP_TOKENS * int(encoder["num_hidden_layers"]) * (4 * width * width + 2 * width * inner)


def _t5_peak_bytes(encoder: Mapping[str, Any], t: int) -> int:
    """Scores, bias and probabilities of all heads, and the three feed-forward tensors."""
    heads, d_ff = int(encoder["num_heads"]), int(encoder["d_ff"])
    return _BYTES * t * (3 * heads * t + 3 * d_ff + 4 * int(encoder["d_model"]))
