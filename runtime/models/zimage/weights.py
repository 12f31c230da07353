"""Which tensors of a diffusers-format Z-Image transformer make up which of our parameters, and loading by that map.

The map is data, read by the loader, and by adapters and quantised checkpoints.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from safelight.runtime.models.loading import load_blocks, read_json
from safelight.runtime.models.zimage.transformer import ZImageConfig, ZImageTransformer

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions

LAYERS: dict[str, str] = {  # with weight and bias
    "patch_embedding": "all_x_embedder.2-1",
    "time_in": "t_embedder.mlp.0",
    "time_out": "t_embedder.mlp.2",
    "caption_embedding": "cap_embedder.1",
    "final_modulation": "all_final_layer.2-1.adaLN_modulation.1",
    "projection": "all_final_layer.2-1.linear",
}
TENSORS: dict[str, str] = {
    "image_pad": "x_pad_token",
    "caption_pad": "cap_pad_token",
    "caption_norm.weight": "cap_embedder.0.weight",
}
BLOCK_WEIGHTS: dict[str, tuple[str, ...]] = {  # of every block, without biases
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "attention.norm_q": ("attention.norm_q",),
    "attention.norm_k": ("attention.norm_k",),
    "feed_forward.up": ("feed_forward.w1", "feed_forward.w3"),
    "feed_forward.down": ("feed_forward.w2",),
    "before_attention": ("attention_norm1",),
    "after_attention": ("attention_norm2",),
    "before_feed_forward": ("ffn_norm1",),
    "after_feed_forward": ("ffn_norm2",),
}
MODULATION = ("modulation", "adaLN_modulation.0")  # weight and bias, in the two lists below
MODULATED: dict[str, str] = {"noise_refiner": "noise_refiner", "blocks": "layers"}
PLAIN: dict[str, str] = {"context_refiner": "context_refiner"}
FLOAT32 = ("time_in.", "time_out.")  # beginnings of names that stay float32

BLOCKS = ("blocks",)  # the lists of blocks that are streamed; the refiners, 4 blocks of 34, stay


def name_map(config: ZImageConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter -> the published tensors that it stacks along dim 0."""
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in TENSORS.items()}
    layers = dict(LAYERS)
    for ours, theirs in (MODULATED | PLAIN).items():
        for index in range(config.n_layers if ours == "blocks" else config.n_refiner_layers):
            for name, sources in BLOCK_WEIGHTS.items():
                names[f"{ours}.{index}.{name}.weight"] = tuple(f"{theirs}.{index}.{s}.weight" for s in sources)
            if ours in MODULATED:
                layers[f"{ours}.{index}.{MODULATION[0]}"] = f"{theirs}.{index}.{MODULATION[1]}"
    for name, source in layers.items():
        for leaf in ("weight", "bias"):
            names[f"{name}.{leaf}"] = (f"{source}.{leaf}",)
    return names


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one of our parameters in a model of `dtype`."""
    return torch.float32 if name.startswith(FLOAT32) else dtype


def load_transformer(folder: Path, options: LoadOptions) -> ZImageTransformer:
    """The transformer in `folder` (config.json and safetensors), on `options.device`, ready for inference.

    Raises ModelError naming the file and the tensor.
    """
    config = ZImageConfig.from_json(read_json(folder / "config.json"))
    return load_blocks(partial(ZImageTransformer, config), folder, options, name_map(config), parameter_dtype, BLOCKS)
