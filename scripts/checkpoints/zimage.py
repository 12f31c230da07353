"""Z-Image and Z-Image-Turbo: the same network, other schedules and defaults."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from checkpoints.parts import Build, Checkpoint, Component

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<think>", "</think>",
)  # fmt: skip
_WORDS = "user assistant a red cat on the blue dog with an old house and green trees in the rain the worst of all "
CHAT_TEMPLATE = (  # what Qwen3's does for plain messages
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen3_tokenizer() -> Any:
    """Byte-level BPE as Qwen3's, with merges that make single tokens of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([_WORDS, _WORDS], trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = {**learned["vocab"], **{name: len(learned["vocab"]) + n for n, name in enumerate(SPECIALS)}}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]], eos_token="<|im_end|>",
        additional_special_tokens=[name for name in SPECIALS if name not in ("<|endoftext|>", "<|im_end|>")],
        model_max_length=131072,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen3(**sizes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3Model(Qwen3Config(tie_word_embeddings=True, rope_parameters=rope, **sizes))


def kl_vae(widths: list[int], layers: int, groups: int) -> Any:
    """With the settings of FLUX's."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths), block_out_channels=widths, layers_per_block=layers,
        norm_num_groups=groups, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.1159, scaling_factor=0.3611,
    )  # fmt: skip


def transformer(**sizes: Any) -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(in_channels=16, **sizes)


def zimage(shift: float, transformer: Build, vae: Build, text_encoder: Build, dtype: torch.dtype) -> Checkpoint:
    def scheduler() -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=shift)

    components = {
        "scheduler": Component(("diffusers", "FlowMatchEulerDiscreteScheduler"), scheduler, weights=False),
        "tokenizer": Component(("transformers", "Qwen2Tokenizer"), qwen3_tokenizer, weights=False),
        "text_encoder": Component(("transformers", "Qwen3Model"), text_encoder),
        "vae": Component(("diffusers", "AutoencoderKL"), vae),
        "transformer": Component(("diffusers", "ZImageTransformer2DModel"), transformer),
    }
    return Checkpoint("ZImagePipeline", components, {}, dtype)


def sizes(shift: float, axes_lens: list[int]) -> Mapping[str, Callable[[], Checkpoint]]:
    return {
        "tiny": lambda: zimage(
            shift,
            lambda: transformer(
                dim=64, n_layers=2, n_refiner_layers=2, n_heads=4, n_kv_heads=4, cap_feat_dim=32, axes_dims=[4, 6, 6],
                axes_lens=[1024, 64, 64],
            ),
            lambda: kl_vae([8, 8, 8, 8], 1, 4),
            lambda: qwen3(
                vocab_size=len(qwen3_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=4096,
            ),
            torch.float32,
        ),
        "full": lambda: zimage(
            shift,
            lambda: transformer(axes_lens=axes_lens),
            lambda: kl_vae([128, 256, 512, 512], 2, 32),
            lambda: qwen3(
                vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
            ),
            torch.bfloat16,
        ),
    }  # fmt: skip


CHECKPOINTS: Mapping[str, Mapping[str, Callable[[], Checkpoint]]] = {
    "z-image": sizes(6.0, [1536, 512, 512]),
    "z-image-turbo": sizes(3.0, [1536, 512, 512]),
}
