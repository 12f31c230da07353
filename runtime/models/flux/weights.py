"""Which tensors of a diffusers-format FLUX transformer make up which of our parameters, and loading by that map.

The map is data, read by the loader, and by adapters and quantised checkpoints. Layers named here have a weight and a
bias.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from safelight.runtime.models.flux.transformer import FluxConfig, FluxTransformer
from safelight.runtime.models.loading import load_blocks, read_json

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions

LAYERS: dict[str, tuple[str, ...]] = {
    "image_embedding": ("x_embedder",),
    "text_embedding": ("context_embedder",),
    "time_embedding.linear_in": ("time_text_embed.timestep_embedder.linear_1",),
    "time_embedding.linear_out": ("time_text_embed.timestep_embedder.linear_2",),
    "pooled_in": ("time_text_embed.text_embedder.linear_1",),
    "pooled_out": ("time_text_embed.text_embedder.linear_2",),
    "projection": ("proj_out",),
}
GUIDANCE_LAYERS: dict[str, tuple[str, ...]] = {
    "guidance_embedding.linear_in": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_embedding.linear_out": ("time_text_embed.guidance_embedder.linear_2",),
}
DOUBLE_LAYERS: dict[str, tuple[str, ...]] = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.text_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attention.out": ("attn.to_out.0",),
    "attention.text_out": ("attn.to_add_out",),
    "feed_forward.up": ("ff.net.0.proj",),
    "feed_forward.down": ("ff.net.2",),
    "text_feed_forward.up": ("ff_context.net.0.proj",),
    "text_feed_forward.down": ("ff_context.net.2",),
}
DOUBLE_NORMS = {  # weight only
    "attention.norm_q": "attn.norm_q",
    "attention.norm_k": "attn.norm_k",
    "attention.norm_text_q": "attn.norm_added_q",
    "attention.norm_text_k": "attn.norm_added_k",
}
SINGLE_LAYERS: dict[str, tuple[str, ...]] = {
    "up": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "down": ("proj_out",),
}
SINGLE_NORMS = {"norm_q": "attn.norm_q", "norm_k": "attn.norm_k"}  # weight only
MODULATION = {
    "double_blocks": ("norm1.linear", "norm1_context.linear"),
    "single_blocks": ("norm.linear",),
}  # of a block
BLOCKS = ("double_blocks", "single_blocks")  # in the order in which forward runs through them
APART = ("modulation.layers",)  # lists that are run through outside of the blocks
FLOAT32 = ("time_embedding.", "guidance_embedding.", "pooled_")  # begin the names of what stays float32


def name_map(config: FluxConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter -> the published tensors that it stacks along dim 0."""
    layers = LAYERS | (GUIDANCE_LAYERS if config.guidance_embeds else {})
    names: dict[str, tuple[str, ...]] = {}
    kinds = (
        ("double_blocks", "transformer_blocks", config.num_layers, DOUBLE_LAYERS, DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", config.num_single_layers, SINGLE_LAYERS, SINGLE_NORMS),
    )
    modulation: list[tuple[str, ...]] = []
    for ours, theirs, count, block_layers, norms in kinds:
        for index in range(count):
            mine, published = f"{ours}.{index}.", f"{theirs}.{index}."
            modulation.append(tuple(published + source for source in MODULATION[ours]))
            layers |= {mine + name: tuple(published + s for s in sources) for name, sources in block_layers.items()}
            names |= {f"{mine}{name}.weight": (f"{published}{source}.weight",) for name, source in norms.items()}
    layers |= {f"modulation.layers.{i}": each for i, each in enumerate([*modulation, ("norm_out.linear",)])}
    for name, sources in layers.items():
        for leaf in ("weight", "bias"):
            names[f"{name}.{leaf}"] = tuple(f"{source}.{leaf}" for source in sources)
    return names


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one of our parameters in a model of `dtype`."""
    return torch.float32 if name.startswith(FLOAT32) else dtype


def load_transformer(folder: Path, options: LoadOptions) -> FluxTransformer:
    """The transformer in `folder` (config.json and safetensors), on `options.device`, ready for inference.

    Raises ModelError naming the file and the tensor.
    """
    config = FluxConfig.from_json(read_json(folder / "config.json"))
    return load_blocks(
        partial(FluxTransformer, config), folder, options, name_map(config), parameter_dtype, BLOCKS, APART
    )
