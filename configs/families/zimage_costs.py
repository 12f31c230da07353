"""What a Z-Image request costs: the JobProfile, from the component configs alone.

Cost unit: TFLOP, a multiply-add counted as two. S image tokens, T caption tokens, E width of the transformer, f of its
feed-forward layer, L layers. How long a caption is only its tokenizer knows: costs guess it from the prompt's letters,
bytes take the longest one. Bytes assume float32 activations, so half of them are spare in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from safelight.configs.encoder_parallel import EncoderShape
from safelight.configs.families.base import AttentionShape, ModelSpec
from safelight.configs.families.kl_costs import decode_cost, spatial_scale
from safelight.configs.profile import BatchKey, JobProfile, Phase
from safelight.configs.sampling_params import SamplingParams

LATENT_CHANNELS = 16
PATCH = 2  # latents of a token's side
MULTIPLE = 32  # to which image and caption tokens are padded
MOST_TEXT_TOKENS = 512  # of a prompt, its template included
WEIGHTS_ID = "transformer"
_TEMPLATE_TOKENS = 8
_BYTES_PER_TOKEN = 4  # of English text
_TIME_WIDTH = 256
_BYTES = 4
_TERA = 1e12
T = TypeVar("T")


def profile(spec: ModelSpec, params: SamplingParams) -> JobProfile:
    """`params` is complete and valid. See the fields of JobProfile."""
    height, width = _given(params.height), _given(params.width)
    scale = spatial_scale(spec.vae)
    shape = (LATENT_CHANNELS, 1, height // scale, width // scale)
    tokens = (shape[2] // PATCH) * (shape[3] // PATCH)
    guided = _given(params.guidance_scale) > 0.0
    texts = [text_tokens(params.prompt), *([text_tokens(params.negative_prompt or "")] if guided else [])]
    captions = [_padded(count) for count in texts]
    latent_bytes = _BYTES * shape[0] * shape[2] * shape[3]
    longest, e = _padded(MOST_TEXT_TOKENS), int(spec.transformer["dim"])
    decode = decode_cost(spec.vae, shape[2], shape[3])
    forwards = sum(_forward_flop(spec.transformer, tokens, caption) for caption in captions)
    encodes = [_encode_flop(spec, n) + _caption_flop(spec.transformer, n) for n in texts]
    return JobProfile(
        family=spec.family,
        latent_shape=shape,
        tokens=tokens,
        steps=_given(params.num_inference_steps),
        outputs=_given(params.num_outputs_per_prompt),
        phases=(Phase(0, WEIGHTS_ID, BatchKey(WEIGHTS_ID, shape, guided, longest), forwards / _TERA),),
        encode_cost=sum(encodes) / _TERA,
        decode_chunk_cost=decode.flop / _TERA,
        chunk_frames=(1,),
        chunk_bytes=height * width * 3,
        conditioning_bytes=_BYTES * longest * e * len(captions),
        state_bytes=latent_bytes,
        encode_peak_bytes=_encode_peak_bytes(spec, longest),
        step_peak_bytes=len(captions) * _forward_peak_bytes(spec.transformer, _padded(tokens) + longest)
        + 8 * latent_bytes,
        decode_peak_bytes=decode.peak_bytes,
    )


def attention(spec: ModelSpec) -> AttentionShape:
    """Of the blocks over image and caption; the two before them see the image only."""
    heads, e = int(spec.transformer["n_heads"]), int(spec.transformer["dim"])
    layers = int(spec.transformer["n_layers"]) + int(spec.transformer["n_refiner_layers"])
    return AttentionShape(heads, e // heads, layers, joint_text=MULTIPLE)


def encoder(spec: ModelSpec) -> EncoderShape:
    """Qwen3's numbers, for sharing it between ranks; its last layer is not run."""
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    width, inner, layers, queries, heads = (int(spec.text_encoder[name]) for name in fields)
    dim = int(spec.text_encoder["head_dim"])
    return EncoderShape(
        layers=layers - 1,
        heads=heads,
        width=width,
        inner=queries * dim,
        keys=heads * dim,
        d_ff=inner,
        vocabulary=int(spec.text_encoder["vocab_size"]),
        prompts=2 if _given(spec.defaults.guidance_scale) > 0 else 1,
    )


def text_tokens(text: str) -> int:
    """A guess: the template's, and one for every four bytes."""
    return min(MOST_TEXT_TOKENS, _TEMPLATE_TOKENS + len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


def _given(value: T | None) -> T:
    assert value is not None, "profile needs complete parameters"
    return value


def _padded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def hidden(transformer: Mapping[str, Any]) -> int:
    """Width f of the feed-forward layers."""
    return int(int(transformer["dim"]) / 3 * 8)


def _block_flop(transformer: Mapping[str, Any], s: int) -> float:
    """8sE^2 for q, k, v and the way out, 4s^2E for attention, 6sEf for the gated feed-forward layer."""
    e, f = int(transformer["dim"]), hidden(transformer)
    return float(8 * s * e * e + 4 * s * s * e + 6 * s * e * f)


def _forward_flop(transformer: Mapping[str, Any], tokens: int, caption: int) -> float:
    """One branch: L blocks over S + T tokens, the image's own over S, their modulation, the way in and out."""
    e, image = int(transformer["dim"]), _padded(tokens)
    layers, refiners = int(transformer["n_layers"]), int(transformer["n_refiner_layers"])
    blocks = layers * _block_flop(transformer, image + caption) + refiners * _block_flop(transformer, image)
    modulation = (layers + refiners) * 8 * min(e, _TIME_WIDTH) * e
    ends = 2 * PATCH * PATCH * LATENT_CHANNELS * e * (tokens + image)
    return float(blocks + modulation + ends)


def _caption_flop(transformer: Mapping[str, Any], text: int) -> float:
    refiners, e = int(transformer["n_refiner_layers"]), int(transformer["dim"])
    way_in = 2 * text * int(transformer["cap_feat_dim"]) * e
    return refiners * _block_flop(transformer, _padded(text)) + way_in


def _forward_peak_bytes(transformer: Mapping[str, Any], s: int) -> int:
    """The feed-forward layer's three tensors of width f, and ten of width E."""
    return _BYTES * s * (3 * hidden(transformer) + 10 * int(transformer["dim"]))


def _encode_flop(spec: ModelSpec, t: int) -> float:
    """All layers but the last; grouped-query attention, a gated feed-forward layer, scores of every pair."""
    shape = encoder(spec)
    return 2.0 * t * shape.layer_weights + shape.layers * 4.0 * t * t * shape.inner


def _encode_peak_bytes(spec: ModelSpec, t: int) -> int:
    """Of one prompt: the encoder's feed-forward layer and scores, then the caption's blocks."""
    encoder = spec.text_encoder
    inner = int(encoder["num_attention_heads"]) * int(encoder["head_dim"])
    scores = 2 * int(encoder["num_attention_heads"]) * t
    widths = 3 * int(encoder["intermediate_size"]) + 4 * int(encoder["hidden_size"]) + 4 * inner
    return max(_BYTES * t * (scores + widths), _forward_peak_bytes(spec.transformer, t))
