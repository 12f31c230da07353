#!/usr/bin/env python3
"""Makes a checkpoint with random weights in diffusers format, complete with tokenizer and sampler configuration.

    scripts/make_checkpoint.py wan2.1-t2v DIR [--size tiny|1.3b] [--seed N] [--components transformer,vae,...]

`tiny` takes seconds on a CPU and drives the tests; the published sizes are for measuring speed and are built directly
on the GPU when there is one. Weights are scaled so that activations stay of order one, and no layer is zero, so a
dropped or swapped layer shows. The same seed gives the same weights on the same kind of device.

A further family is one entry in `FAMILIES`: its components' builders, by size, and its model_index.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

Build = Callable[[], Any]  # gives something with save_pretrained


@dataclass(frozen=True, slots=True)
class Component:
    """`kind` is (library, class) as in model_index.json; `weights` says whether it is a module."""

    kind: tuple[str, str]
    build: Build
    weights: bool = True


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One family at one size."""

    pipeline: str
    components: Mapping[str, Component]
    extra: Mapping[str, Any]  # further entries of model_index.json
    dtype: torch.dtype


def t5_tokenizer() -> Any:
    """A unigram tokenizer over single characters and pieces of words, laid out as T5's (pad 0, end 1, unknown 2)."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(33, 127)] + list("àâäçéèêëîïñóôöùûüßøåæœ¿¡—–…°日本語中文猫犬")
    pieces = ["▁a", "▁the", "▁of", "▁on", "▁in", "▁and", "▁red", "▁blue", "▁cat", "▁dog", "▁with", "ing", "er", "ed", "tion", "ly", "es"]  # fmt: skip  # noqa: E501
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0)]
    vocab += [(letter, -6.0) for letter in letters] + [(piece, -4.0 - 0.1 * len(piece)) for piece in pieces]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


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


FAMILIES: Mapping[str, Mapping[str, Callable[[], Checkpoint]]] = {
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


@torch.no_grad()
def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Fills every parameter: matrices and convolutions by their fan-in, norms near one, biases small."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32)
        norm = "norm" in name or name.endswith("gamma")
        if norm and not name.endswith("bias"):
            noise = 1 + 0.1 * noise
        elif "scale_shift_table" in name:
            noise *= 0.2
        elif parameter.ndim >= 2 and not norm:
            noise /= parameter[0].numel() ** 0.5
            if name.endswith("SelfAttention.q.weight"):  # T5 folds the attention scale into q
                noise /= module.config.d_kv**0.5
        else:
            noise *= 0.05
        parameter.copy_(noise)


def build(component: Component, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """One component, filled; modules are made without storage first, so nothing is initialised twice."""
    if not component.weights:
        return component.build()
    with torch.device("meta"):
        made = component.build()
    if dtype != torch.float32:
        made.to(dtype)
    made.to_empty(device=device)
    if hasattr(made, "tie_weights"):
        made.tie_weights()
    randomize(made, torch.Generator(device).manual_seed(seed))
    return made.eval()


def make(family: str, folder: Path, size: str = "tiny", seed: int = 0, components: tuple[str, ...] | None = None,
         device: torch.device | None = None) -> None:  # fmt: skip
    """Writes the checkpoint. `components` None means all; model_index.json always names all of them."""
    checkpoint = FAMILIES[family][size]()
    device = device or torch.device("cuda" if torch.cuda.is_available() and size != "tiny" else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, component) in enumerate(checkpoint.components.items()):
        if components is None or name in components:
            made = build(component, checkpoint.dtype, device, seed * 1000 + number)
            made.save_pretrained(folder / name)
            del made
    index: dict[str, Any] = {"_class_name": checkpoint.pipeline, "_diffusers_version": "0.42.1", **checkpoint.extra}
    index |= {name: list(component.kind) for name, component in checkpoint.components.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a checkpoint with random weights in diffusers format.")
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--components", help="comma-separated subset; default: all")
    parser.add_argument("--device", type=torch.device, help="where weights are made (default: the GPU for large sizes)")
    args = parser.parse_args()
    if args.size not in FAMILIES[args.family]:
        parser.error(f"--size: one of {', '.join(FAMILIES[args.family])} expected, got {args.size!r}")
    names = None if args.components is None else tuple(args.components.split(","))
    known = FAMILIES[args.family][args.size]().components
    if names and (unknown := [name for name in names if name not in known]):
        parser.error(f"--components: {', '.join(unknown)} unknown; {args.family} has {', '.join(known)}")
    make(args.family, args.folder, args.size, args.seed, names, args.device)
    print(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
