"""Wan 2.1 text-to-video."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from checkpoints.parts import Build, Checkpoint, Component, t5_tokenizer


def umt5(**sizes: Any) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes))


def wan_vae(base_dim: int, **sizes: Any) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=base_dim, z_dim=16, temperal_downsample=[False, True, True], **sizes)


def wan_transformer(heads: int, head_dim: int, text_dim: int, freq_dim: int, ffn_dim: int, layers: int) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=text_dim,
        freq_dim=freq_dim,
        ffn_dim=ffn_dim,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def flow_unipc() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )


def wan(transformer: Build, vae: Build, text_encoder: Build, dtype: torch.dtype) -> Checkpoint:
    components = {
        "scheduler": Component(("diffusers", "UniPCMultistepScheduler"), flow_unipc, weights=False),
        "tokenizer": Component(("transformers", "T5TokenizerFast"), t5_tokenizer, weights=False),
        "text_encoder": Component(("transformers", "UMT5EncoderModel"), text_encoder),
        "vae": Component(("diffusers", "AutoencoderKLWan"), vae),
        "transformer": Component(("diffusers", "WanTransformer3DModel"), transformer),
    }
    extra = {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False}
    return Checkpoint("WanPipeline", components, extra, dtype)


CHECKPOINTS: Mapping[str, Mapping[str, Callable[[], Checkpoint]]] = {
    "wan2.1-t2v": {
        "tiny": lambda: wan(
            lambda: wan_transformer(4, 12, text_dim=32, freq_dim=32, ffn_dim=64, layers=2),
            lambda: wan_vae(8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
            lambda: umt5(
                vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                relative_attention_num_buckets=8, relative_attention_max_distance=32,
            ),
            torch.float32,
        ),
        "1.3b": lambda: wan(
            lambda: wan_transformer(12, 128, text_dim=4096, freq_dim=256, ffn_dim=8960, layers=30),
            lambda: wan_vae(96),
            lambda: umt5(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
            torch.bfloat16,
        ),
    },
}  # fmt: skip
