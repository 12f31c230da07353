"""Qwen-Image, Qwen-Image-Edit (one picture) and Qwen-Image-Edit-Plus (several: -2509, -2511)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.parts import Build, Checkpoint, Component

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_WORDS = """system user assistant Describe the image by detailing color, shape, size, texture, quantity, text, spatial
 relationships of objects and background: key features input (color, objects, background), then explain how user's text
 instruction should alter or modify image. Generate a new that meets requirements while maintaining consistency with
 original where appropriate. Picture 1 : a red cat on blue dog make it green"""


def qwen2_tokenizer() -> Any:
    """Byte-level BPE as Qwen2's, whose merges make single tokens of the words in the templates and a few more."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    words = " ".join(_WORDS.split())
    learner.train_from_iterator([words, words], trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = dict(learned["vocab"])
    for special in SPECIALS:
        vocab[special] = len(vocab)
    merges = [tuple(merge) for merge in learned["merges"]]
    return Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", additional_special_tokens=[*SPECIALS[1:2], *SPECIALS[3:]],
        model_max_length=131072,
    )  # fmt: skip


def token_ids() -> dict[str, int]:
    """What the text encoder's configuration calls its special tokens, in the tokenizer above."""
    to_id = qwen2_tokenizer().convert_tokens_to_ids
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start"}
    names |= {"vision_end_token_id": "vision_end", "vision_token_id": "vision_pad"}
    return {name: to_id(f"<|{token}|>") for name, token in names.items()}


def qwen2_5_vl(text: Mapping[str, Any], vision: Mapping[str, Any], special: Mapping[str, int]) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=dict(text), vision_config=dict(vision), tie_word_embeddings=False, **dict(special)
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def tiny_text_encoder() -> Any:
    tokenizer = qwen2_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "bos_token_id": None, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return qwen2_5_vl(text, vision, token_ids())


def full_text_encoder() -> Any:
    """Qwen2.5-VL-7B-Instruct."""
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    return qwen2_5_vl(text, vision, token_ids())


@dataclass(frozen=True, slots=True)
class ProcessorFiles:
    """What a Qwen2VLProcessor keeps in its folder. The class itself needs torchvision."""

    pixels: Mapping[str, int]  # the least and the most pixels of a picture that the text encoder sees

    def save_pretrained(self, folder: Path) -> None:
        from transformers import Qwen2VLImageProcessorPil

        qwen2_tokenizer().save_pretrained(folder)
        Qwen2VLImageProcessorPil(size=dict(self.pixels)).save_pretrained(folder)


def qwen_vae(base_dim: int, **sizes: Any) -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=base_dim, temperal_downsample=[False, True, True], **sizes)


def tiny_vae() -> Any:
    means = {"latents_mean": [-0.7, 0.1, 0.4, -0.2], "latents_std": [2.8, 1.4, 2.3, 1.9]}
    return qwen_vae(8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **means)


def qwen_transformer(zero_cond_t: bool, **sizes: Any) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(zero_cond_t=zero_cond_t, **sizes)


def flow_euler() -> Any:
    """The published settings."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
        max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip


def qwen(pipeline: str, transformer: Build, vae: Build, text_encoder: Build, pixels: Mapping[str, int] | None,
         dtype: torch.dtype) -> Checkpoint:  # fmt: skip
    components = {
        "scheduler": Component(("diffusers", "FlowMatchEulerDiscreteScheduler"), flow_euler, weights=False),
        "tokenizer": Component(("transformers", "Qwen2Tokenizer"), qwen2_tokenizer, weights=False),
        "text_encoder": Component(("transformers", "Qwen2_5_VLForConditionalGeneration"), text_encoder),
        "vae": Component(("diffusers", "AutoencoderKLQwenImage"), vae),
        "transformer": Component(("diffusers", "QwenImageTransformer2DModel"), transformer),
    }
    if pixels is not None:
        kind = ("transformers", "Qwen2VLProcessor")
        components["processor"] = Component(kind, lambda: ProcessorFiles(pixels), weights=False)
    return Checkpoint(pipeline, components, {}, dtype)


def sizes(pipeline: str, *, edits: bool, zero_cond_t: bool = False) -> Mapping[str, Callable[[], Checkpoint]]:
    tiny = {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    small = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84} if edits else None
    published = {"shortest_edge": 56 * 56, "longest_edge": 12845056} if edits else None
    return {
        "tiny": lambda: qwen(
            pipeline, lambda: qwen_transformer(zero_cond_t, **tiny), tiny_vae, tiny_text_encoder, small, torch.float32
        ),
        "full": lambda: qwen(
            pipeline, lambda: qwen_transformer(zero_cond_t), lambda: qwen_vae(96), full_text_encoder, published,
            torch.bfloat16,
        ),
    }  # fmt: skip


CHECKPOINTS: Mapping[str, Mapping[str, Callable[[], Checkpoint]]] = {
    "qwen-image": sizes("QwenImagePipeline", edits=False),
    "qwen-image-edit": sizes("QwenImageEditPipeline", edits=True),
    "qwen-image-edit-plus": sizes("QwenImageEditPlusPipeline", edits=True),
    "qwen-image-edit-2511": sizes("QwenImageEditPlusPipeline", edits=True, zero_cond_t=True),
}
