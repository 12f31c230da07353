"""Which tensors of a diffusers-format Wan transformer make up which of our parameters, and loading by that map.

The map is data, read by the loader, and by adapters and quantised checkpoints. Layers named
here have a weight and a bias unless said otherwise.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from safelight.runtime.models.loading import load_blocks, read_json
from safelight.runtime.models.wan.transformer import WanConfig, WanTransformer

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions

LAYERS: dict[str, tuple[str, ...]] = {
    "patch_embedding": ("patch_embedding",),
    "time_embedding.linear_in": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.linear_out": ("condition_embedder.time_embedder.linear_2",),
    "time_projection": ("condition_embedder.time_proj",),
    "text_embedding.up": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.down": ("condition_embedder.text_embedder.linear_2",),
    "projection": ("proj_out",),
}
BLOCK_LAYERS: dict[str, tuple[str, ...]] = {
    "self_attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "self_attention.out": ("attn1.to_out.0",),
    "cross_attention.q": ("attn2.to_q",),
    "cross_attention.kv": ("attn2.to_k", "attn2.to_v"),
    "cross_attention.out": ("attn2.to_out.0",),
    "feed_forward.up": ("ffn.net.0.proj",),
    "feed_forward.down": ("ffn.net.2",),
}
BLOCK_NORMS = {  # weight only
    "self_attention.norm_q": "attn1.norm_q",
    "self_attention.norm_k": "attn1.norm_k",
    "cross_attention.norm_q": "attn2.norm_q",
    "cross_attention.norm_k": "attn2.norm_k",
}
CROSS_NORM = ("cross_norm", "norm2")
MODULATION = ("modulation", "scale_shift_table")
BLOCKS = ("blocks",)  # the lists of blocks, in the order in which forward runs through them
FLOAT32 = ("time_embedding.", "cross_norm.", "modulation")  # parts of names that stay float32, as diffusers keeps them


def name_map(config: WanConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter -> the published tensors that it stacks along dim 0."""
    layers = dict(LAYERS)
    names: dict[str, tuple[str, ...]] = {MODULATION[0]: (MODULATION[1],)}
    for index in range(config.num_layers):
        ours = theirs = f"blocks.{index}."
        layers |= {ours + name: tuple(theirs + s for s in sources) for name, sources in BLOCK_LAYERS.items()}
        if config.cross_attn_norm:
            layers[ours + CROSS_NORM[0]] = (theirs + CROSS_NORM[1],)
        names |= {f"{ours}{name}.weight": (f"{theirs}{source}.weight",) for name, source in BLOCK_NORMS.items()}
        names[ours + MODULATION[0]] = (theirs + MODULATION[1],)
    for name, sources in layers.items():
        for leaf in ("weight", "bias"):
            names[f"{name}.{leaf}"] = tuple(f"{source}.{leaf}" for source in sources)
    return names


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one of our parameters in a model of `dtype`."""
    return torch.float32 if any(part in name for part in FLOAT32) else dtype


def load_transformer(folder: Path, options: LoadOptions) -> WanTransformer:
    """The transformer in `folder` (config.json and safetensors), on `options.device`, ready for inference.

    Raises ModelError naming the file and the tensor.
    """
    config = WanConfig.from_json(read_json(folder / "config.json"))
    return load_blocks(
        partial(WanTransformer, config),
        folder,
        options,
        name_map(config),
        parameter_dtype,
        BLOCKS,
        ignored=lambda name: "norm_added_q" in name,  # in some published files, used by no layer
    )
