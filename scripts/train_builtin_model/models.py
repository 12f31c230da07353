"""The three networks, in diffusers' and transformers' own classes, at the shipped sizes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

LATENT_CHANNELS = 16
TEXT_WIDTH = 160
DIT_WIDTH = 256
TEXT_LENGTH = 512  # WanPipeline pads text embeddings with zeros to this many tokens
FLOW_SHIFT = 3.0


def make_vae() -> AutoencoderKLWan:
    """8x spatial and 4x temporal compression; about 0.9 M parameters."""
    return AutoencoderKLWan(
        base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )  # fmt: skip


@torch.no_grad()
def initialise_vae(vae: AutoencoderKLWan) -> None:
    """Start with almost no noise on the latents: their means begin near 0.1, which unit noise would drown."""
    vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Three layers of width 160; about 1 M parameters."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size, d_model=TEXT_WIDTH, d_kv=32, d_ff=320, num_layers=3, num_heads=5,
            feed_forward_proj="gated-gelu", relative_attention_num_buckets=32, relative_attention_max_distance=64,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


def make_transformer() -> WanTransformer3DModel:
    """Eight Wan blocks of width 256; 9.1 M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=DIT_WIDTH // 4, in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS, text_dim=TEXT_WIDTH, freq_dim=256, ffn_dim=4 * DIT_WIDTH, num_layers=8,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=128,
    )  # fmt: skip


def make_scheduler() -> UniPCMultistepScheduler:
    """The sampler that Wan ships with."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)


@torch.no_grad()
def initialise_text_encoder(model: UMT5EncoderModel) -> None:
    """Two heads of every layer begin by looking to the left, two to the right.

    With the usual start, near zero, a noun has the same words around it whichever side of "above" it stands on, and
    no gradient says otherwise: after 350 steps on pairs alone the order was still told by chance, with this start
    always right after 100.
    """
    for block in model.encoder.block:
        bias = block.layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
        right = bias.shape[0] // 2  # from here on the key stands to the right of the query
        for head in range(0, 4, 2):
            bias[right:, head] -= 4.0
            bias[:right, head + 1] -= 4.0


@torch.no_grad()
def initialise_transformer(model: WanTransformer3DModel) -> None:
    """Start values that spare the first minutes of training.

    The output starts at zero. In cross attention, about 500 of the 512 keys are the same padding, which would
    take 98 % of the attention: a common direction, negative in keys and positive in queries, gives the padding
    key a low score from the start (a padding key is that direction alone, as its embedding is zero).
    """
    model.proj_out.weight.zero_()
    model.proj_out.bias.zero_()
    embedder = model.condition_embedder.text_embedder
    for linear in (embedder.linear_1, embedder.linear_2):
        linear.bias.zero_()
    for block in model.blocks:
        attention = block.attn2
        direction = torch.randn(DIT_WIDTH)
        direction /= direction.square().mean().sqrt()
        attention.to_q.bias.copy_(0.6 * direction)
        attention.to_k.bias.copy_(-0.15 * direction)
        attention.to_v.bias.zero_()
