"""What a Qwen-Image request costs: the JobProfile, from the component configs and the request's size and pictures.

Cost unit: TFLOP, a multiply-add counted as two. S image tokens, T text tokens, E width of the transformer, L layers.
Bytes assume float32 activations, so half of them are spare in bfloat16: an estimate that is too low ends a worker
group, one that is too high delays a job. Texts are counted as TYPICAL_TEXT tokens in costs and as MAX_TEXT in bytes,
because a profile is made without a tokenizer; pictures to edit by their area, which is about the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from types import MappingProxyType
from typing import Any, TypeVar

from safelight.configs.encoder_parallel import EncoderShape
from safelight.configs.families.base import AttentionShape, ModelSpec
from safelight.configs.families.qwen_pictures import EDIT_RULES, Patches, fitted
from safelight.configs.families.wan_costs import decode_frame
from safelight.configs.profile import BatchKey, JobProfile, Phase
from safelight.configs.sampling_params import SamplingParams

SPATIAL, PATCH = 8, 2  # pixels of a latent, latents of a token, along each side
MAX_TEXT = 512  # tokens of a prompt that the transformer reads: the default of diffusers' QwenImagePipeline
MAX_EDIT_TEXT = 3900  # the same of an instruction with its pictures' tokens: rotary positions end at 4096
TYPICAL_TEXT = 64
TEMPLATE_TOKENS = MappingProxyType({0: 34, 1: 64, 3: 64})  # before a prompt, by the most pictures that a model takes
WEIGHTS_ID = "transformer"
_BYTES = 4
_TERA = 1e12
T = TypeVar("T")


def pictures_of(spec: ModelSpec, params: SamplingParams) -> int:
    """How many pictures the request brings; the least that the model takes where that is not known."""
    return max(spec.images[0], len(params.image_path))


def profile(spec: ModelSpec, params: SamplingParams) -> JobProfile:
    """`params` is complete and valid. See the fields of JobProfile."""
    height, width = _given(params.height), _given(params.width)
    channels = int(spec.vae["z_dim"])
    shape = (channels, 1, height // SPATIAL, width // SPATIAL)
    made = shape[2] * shape[3] // PATCH**2
    pictures = pictures_of(spec, params)
    area, seen = kept_area(spec), seen_tokens(spec)
    kept = area // (SPATIAL * PATCH) ** 2
    tokens, text = made + pictures * kept, TYPICAL_TEXT + pictures * seen
    guided = _given(params.true_cfg_scale) > 1.0
    branches = 2 if guided else 1
    latent_bytes = _BYTES * channels * shape[2] * shape[3]
    longest = MAX_TEXT if not pictures else MAX_EDIT_TEXT
    text_bytes = _BYTES * longest * int(spec.transformer["joint_attention_dim"]) * branches
    kept_bytes = pictures * _BYTES * channels * area // SPATIAL**2
    decode = decode_frame(spec.vae, shape[2], shape[3], 1)
    side = isqrt(area) // SPATIAL
    encode = decode_frame(spec.vae, side, side, 1)  # an encoder's levels are those of a decoder, with fewer blocks
    key = BatchKey(WEIGHTS_ID, shape, guided, 0)
    return JobProfile(
        family=spec.family,
        latent_shape=shape,
        tokens=made,
        steps=_given(params.num_inference_steps),
        outputs=_given(params.num_outputs_per_prompt),
        phases=(Phase(0, WEIGHTS_ID, key, branches * forward_flop(spec.transformer, tokens, text) / _TERA),),
        encode_cost=(branches * _encode_flop(spec, text, pictures * seen) + pictures * encode.flop) / _TERA,
        decode_chunk_cost=decode.flop / _TERA,
        chunk_frames=(1,),
        chunk_bytes=height * width * 3,
        conditioning_bytes=text_bytes + kept_bytes,
        state_bytes=latent_bytes,
        encode_peak_bytes=text_bytes + _encode_peak_bytes(spec, longest, seen, encode.peak_bytes if pictures else 0),
        step_peak_bytes=_forward_peak_bytes(spec.transformer, tokens + longest, branches) + 8 * branches * latent_bytes,
        decode_peak_bytes=decode.peak_bytes,
    )


def attention(spec: ModelSpec) -> AttentionShape:
    """Text, the result and at least one picture to edit are one sequence."""
    heads, dim, layers = (
        int(spec.transformer[name]) for name in ("num_attention_heads", "attention_head_dim", "num_layers")
    )
    beside = TYPICAL_TEXT + spec.images[0] * (seen_tokens(spec) + kept_area(spec) // (SPATIAL * PATCH) ** 2)
    return AttentionShape(heads, dim, layers, beside, 12 * (heads * dim) ** 2 * layers)


def encoder(spec: ModelSpec) -> EncoderShape:
    """The language model's numbers, for sharing it between ranks; the vision tower is small and whole on each."""
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    width, inner, layers, queries, heads = (int(spec.text_encoder[name]) for name in fields)
    return EncoderShape(
        layers=layers,
        heads=heads,
        width=width,
        inner=width,
        keys=width // queries * heads,
        d_ff=inner,
        vocabulary=int(spec.text_encoder["vocab_size"]),
        tokens=TEMPLATE_TOKENS[spec.images[1]] + TYPICAL_TEXT + spec.images[0] * seen_tokens(spec),
    )


def kept_area(spec: ModelSpec) -> int:
    """Pixels of one picture to edit as the transformer sees it; 0 for a model that takes none."""
    return EDIT_RULES[spec.images[1]].kept_area if spec.images[1] else 0


def seen_tokens(spec: ModelSpec) -> int:
    """Text encoder's tokens of one square picture to edit; 0 for a model that takes none."""
    if not spec.images[1]:
        return 0
    rows, columns = Patches.of(spec.processor).grid(fitted((1, 1), EDIT_RULES[spec.images[1]].seen_area))
    return rows * columns


def forward_flop(transformer: Mapping[str, Any], s: int, t: int) -> float:
    """One sample. A block: attention's four matrices and a feed-forward layer of width 4E for each token (24E^2),
    4(S+T)^2 E for scores and values, and 24E^2 for its modulation; then the embeddings and the last projection."""
    e = int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"])
    n = s + t
    block = 24 * n * e * e + 4 * n * n * e + 24 * e * e
    ends = 4 * s * e * int(transformer["in_channels"]) + 2 * t * e * int(transformer["joint_attention_dim"])
    return float(int(transformer["num_layers"]) * block + ends + 2 * e * (256 + 3 * e))


def _given(value: T | None) -> T:
    assert value is not None, "profile needs complete parameters"
    return value


def _forward_peak_bytes(transformer: Mapping[str, Any], n: int, branches: int) -> int:
    """One sample of n tokens (branches of other lengths run one after the other, in each block or in all): the
    feed-forward layer's two tensors of width 4E, eight of width E (x, q, k, v, ...), and the rotary tables, by head; of
    another branch x and the tables."""
    e = int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"])
    return 2 * _BYTES * n * (2 * 4 * e + 8 * e + e + (branches - 1) * 2 * e)


def _encode_flop(spec: ModelSpec, text: int, seen: int) -> float:
    """Text tokens through the language model, and the patches of `seen` picture tokens through the vision tower."""
    flop = 2.0 * text * encoder(spec).layer_weights
    if not seen:
        return flop
    v = spec.text_encoder["vision_config"]
    narrow, wide = int(v["hidden_size"]), int(v["intermediate_size"])
    return flop + 2.0 * 4 * seen * int(v["depth"]) * (4 * narrow * narrow + 3 * narrow * wide)


def _encode_peak_bytes(spec: ModelSpec, text: int, seen: int, vae: int) -> int:
    """The larger of the language model's feed-forward layer, the vision tower's scores and the VAE's encoder."""
    c = spec.text_encoder
    language = _BYTES * text * (3 * int(c["intermediate_size"]) + 6 * int(c["hidden_size"]))
    if not seen:
        return language
    v = c["vision_config"]
    patches = 4 * seen
    vision = _BYTES * patches * (3 * int(v["intermediate_size"]) + 8 * int(v["hidden_size"]))
    return max(language, vision + _BYTES * int(v["num_heads"]) * patches * patches // 4, vae)
