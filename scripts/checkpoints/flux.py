"""FLUX.1-dev and FLUX.1-schnell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.parts import Checkpoint, Component, t5_tokenizer

CLIP_MERGES = ("a t</w>", "c at</w>", "t h", "th e</w>", "d o", "do g</w>", "r e", "re d</w>")


@dataclass(frozen=True, slots=True)
class ClipTokenizerFiles:
    """CLIP's tokenizer over bytes and a few words, in the files that published checkpoints have."""

    def vocabulary(self) -> dict[str, int]:
        from tokenizers.pre_tokenizers import ByteLevel

        letters = sorted(ByteLevel.alphabet())
        pieces = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in CLIP_MERGES)]
        return {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = self.vocabulary()
        plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": True}
        special = {str(vocabulary[t]): {"content": t, **plain} for t in ("<|startoftext|>", "<|endoftext|>")}
        config = {"added_tokens_decoder": special, "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
        config |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "model_max_length": 77}
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *CLIP_MERGES, ""]), encoding="utf-8")
        config["tokenizer_class"] = "CLIPTokenizer"
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def clip_text(vocabulary: int, **sizes: Any) -> Any:
    """Its end token is the highest id, which the published config says as eos_token_id 2."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, eos_token_id=2, bos_token_id=0, pad_token_id=1, **sizes))


def t5(vocabulary: int, **sizes: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes)
    )


def kl_vae(widths: tuple[int, ...], layers: int, groups: int) -> Any:
    from diffusers import AutoencoderKL

    levels = len(widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=layers,
        latent_channels=16,
        norm_num_groups=groups,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def transformer(guidance: bool, **sizes: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(patch_size=1, in_channels=64, guidance_embeds=guidance, **sizes)


def scheduler(dev: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)


def flux(dev: bool, parts: Mapping[str, Callable[[], Any]], dtype: torch.dtype) -> Checkpoint:
    components = {
        "scheduler": Component(("diffusers", "FlowMatchEulerDiscreteScheduler"), lambda: scheduler(dev), weights=False),
        "tokenizer": Component(("transformers", "CLIPTokenizer"), ClipTokenizerFiles, weights=False),
        "tokenizer_2": Component(("transformers", "T5TokenizerFast"), t5_tokenizer, weights=False),
        "text_encoder": Component(("transformers", "CLIPTextModel"), parts["clip"]),
        "text_encoder_2": Component(("transformers", "T5EncoderModel"), parts["t5"]),
        "vae": Component(("diffusers", "AutoencoderKL"), parts["vae"]),
        "transformer": Component(("diffusers", "FluxTransformer2DModel"), parts["transformer"]),
    }
    return Checkpoint("FluxPipeline", components, {}, dtype)


def tiny(dev: bool) -> Checkpoint:
    return flux(dev, {
        "clip": lambda: clip_text(
            len(ClipTokenizerFiles().vocabulary()), hidden_size=24, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=3, projection_dim=24,
        ),
        "t5": lambda: t5(
            len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            relative_attention_num_buckets=8, relative_attention_max_distance=32,
        ),
        "vae": lambda: kl_vae((8, 8, 16, 16), layers=1, groups=4),
        "transformer": lambda: transformer(
            dev, num_layers=2, num_single_layers=2, num_attention_heads=4, attention_head_dim=16,
            joint_attention_dim=32, pooled_projection_dim=24, axes_dims_rope=(4, 6, 6),
        ),
    }, torch.float32)  # fmt: skip


def full(dev: bool) -> Checkpoint:
    return flux(dev, {
        "clip": lambda: clip_text(
            49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            projection_dim=768,
        ),
        "t5": lambda: t5(32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
        "vae": lambda: kl_vae((128, 256, 512, 512), layers=2, groups=32),
        "transformer": lambda: transformer(
            dev, num_layers=19, num_single_layers=38, num_attention_heads=24, attention_head_dim=128,
            joint_attention_dim=4096, pooled_projection_dim=768,
        ),
    }, torch.bfloat16)  # fmt: skip


CHECKPOINTS: Mapping[str, Mapping[str, Callable[[], Checkpoint]]] = {
    "flux1-dev": {"tiny": lambda: tiny(True), "full": lambda: full(True)},
    "flux1-schnell": {"tiny": lambda: tiny(False), "full": lambda: full(False)},
}
