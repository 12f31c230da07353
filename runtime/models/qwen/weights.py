"""Which tensors of a diffusers-format Qwen-Image transformer make up which of our parameters, and loading by that map.

The map is data, read by the loader, and by adapters and quantised checkpoints. Layers named here have a weight and a
bias unless said otherwise.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from safelight.runtime.models.loading import load_blocks, read_json
from safelight.runtime.models.qwen.transformer import QwenConfig, QwenTransformer

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions

LAYERS: dict[str, tuple[str, ...]] = {
    "image_embedding": ("img_in",),
    "text_embedding": ("txt_in",),
    "time_embedding.linear_in": ("time_text_embed.timestep_embedder.linear_1",),
    "time_embedding.linear_out": ("time_text_embed.timestep_embedder.linear_2",),
    "projection": ("proj_out",),
}
NORMS = {"text_norm": "txt_norm"}  # weight only
BLOCK_LAYERS: dict[str, tuple[str, ...]] = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.text_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attention.out": ("attn.to_out.0",),
    "attention.text_out": ("attn.to_add_out",),
    "feed_forward.up": ("img_mlp.net.0.proj",),
    "feed_forward.down": ("img_mlp.net.2",),
    "text_feed_forward.up": ("txt_mlp.net.0.proj",),
    "text_feed_forward.down": ("txt_mlp.net.2",),
}
BLOCK_NORMS = {  # weight only
    "attention.norm_q": "attn.norm_q",
    "attention.norm_k": "attn.norm_k",
    "attention.norm_text_q": "attn.norm_added_q",
    "attention.norm_text_k": "attn.norm_added_k",
}
MODULATION = ("img_mod.1", "txt_mod.1")  # of a block, in one layer
BLOCKS = ("blocks",)  # the lists of blocks, in the order in which forward runs through them
APART = ("modulation.layers",)  # lists that are run through outside of the blocks
FLOAT32 = ("time_embedding.",)  # parts of names that are float32 whatever the model's dtype


def name_map(config: QwenConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter -> the published tensors that it stacks along dim 0."""
    layers, norms = dict(LAYERS), dict(NORMS)
    for index in range(config.num_layers):
        ours, theirs = f"blocks.{index}.", f"transformer_blocks.{index}."
        layers |= {ours + name: tuple(theirs + s for s in sources) for name, sources in BLOCK_LAYERS.items()}
        layers[f"modulation.layers.{index}"] = tuple(theirs + source for source in MODULATION)
        norms |= {ours + name: theirs + source for name, source in BLOCK_NORMS.items()}
    layers[f"modulation.layers.{config.num_layers}"] = ("norm_out.linear",)
    names: dict[str, tuple[str, ...]] = {f"{name}.weight": (f"{source}.weight",) for name, source in norms.items()}
    for name, sources in layers.items():
        for leaf in ("weight", "bias"):
            names[f"{name}.{leaf}"] = tuple(f"{source}.{leaf}" for source in sources)
    return names


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one of our parameters in a model of `dtype`."""
    return torch.float32 if any(part in name for part in FLOAT32) else dtype


def load_transformer(folder: Path, options: LoadOptions) -> QwenTransformer:
    """The transformer in `folder` (config.json and safetensors), on `options.device`, ready for inference.

    Raises ModelError naming the file and the tensor.
    """
    config = QwenConfig.from_json(read_json(folder / "config.json"))
    return load_blocks(
        partial(QwenTransformer, config), folder, options, name_map(config), parameter_dtype, BLOCKS, APART
    )
