"""Tiny checkpoints with random weights of diffusers pipelines that have no native family."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

diffusers: Any = importlib.import_module("diffusers")  # untyped
_BYTES = tuple(sorted(ByteLevel.alphabet()))


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    words = [*_BYTES, *(letter + "</w>" for letter in _BYTES), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def clip_encoder(tokenizer: Any, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("▁", -3.0)] + [(chr(c), -4.0) for c in range(33, 127)]
    return T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=120)


def t5_encoder(tokenizer: Any, width: int = 32) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=32,
        )
    )  # fmt: skip


def kl_vae(channels: int, **changes: Any) -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4,
        latent_channels=channels, sample_size=32, **changes,
    )  # fmt: skip


def _stable_diffusion_parts() -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer, "text_encoder": clip_encoder(tokenizer), "unet": unet, "vae": kl_vae(4),
        "scheduler": scheduler, "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip


def stable_diffusion_img2img() -> Any:
    return diffusers.StableDiffusionImg2ImgPipeline(**_stable_diffusion_parts(), requires_safety_checker=False)


def stable_diffusion_pag() -> Any:
    """Changes the attention processors of the shared UNet for the time of a call; PNDM remembers earlier predictions,
    and makes one iteration more than the steps asked for."""
    return diffusers.StableDiffusionPAGPipeline(
        **_stable_diffusion_parts(), requires_safety_checker=False, pag_applied_layers=["mid"]
    )


def pixart() -> Any:
    """Has the older kind of step callback, and a multistep solver."""
    tokenizer = t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        patch_size=2, cross_attention_dim=32, caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip
    solver = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtAlphaPipeline(tokenizer, t5_encoder(tokenizer), kl_vae(4), transformer, solver)


def stable_diffusion_3() -> Any:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=8,
        pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(8, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip_encoder(clip, projected=True), tokenizer=clip,
        text_encoder_2=clip_encoder(clip, projected=True), tokenizer_2=clip,
        text_encoder_3=t5_encoder(t5, 64), tokenizer_3=t5,
    )  # fmt: skip


def ltx() -> Any:
    """Text to video."""
    tokenizer = t5_tokenizer()
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return diffusers.LTXPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae,
        text_encoder=t5_encoder(tokenizer), tokenizer=tokenizer,
    )  # fmt: skip


def wan_between() -> Any:
    """A video between a first and a last picture; no native family runs it."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=36, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=64, num_layers=1, rope_max_seq_len=64,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


PIPELINES: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {f.__name__: f for f in (stable_diffusion_img2img, stable_diffusion_pag, pixart,
                             stable_diffusion_3, ltx, wan_between)}
)  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """Saves the pipeline `name` with seeded weights, none of them zero."""
    pipe = PIPELINES[name]()
    for number, part in enumerate(p for p in pipe.components.values() if isinstance(p, nn.Module)):
        _fill(part, torch.Generator().manual_seed(number))
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        elif "norm" not in name:
            parameter.copy_(0.05 * noise)
