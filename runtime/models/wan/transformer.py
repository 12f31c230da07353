"""The Wan video transformer (Wan 2.1; the same network serves Wan 2.2), from our layers.

Computes like diffusers' WanTransformer3DModel, float32 islands included: norms, modulation, gates, rotary positions
and the time embedding are float32 whatever the model's dtype. When ranks share the sequence, latents in and
prediction out are whole on every rank; tokens are sharded in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.kernels.dispatch import KernelSet
from safelight.runtime.errors import ModelError
from safelight.runtime.layers.attention import CrossAttention, SelfAttention
from safelight.runtime.layers.embeddings import FeedForward, TimeEmbedding, patchify, unpatchify
from safelight.runtime.layers.linear import Adapters, Linear, adapters_of, scoped
from safelight.runtime.layers.norm import LayerNorm
from safelight.runtime.layers.rope import Rope3D, Rotary
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.parallel.sequence import SequenceGroups


@dataclass(frozen=True, slots=True)
class WanConfig:
    """The fields of transformer/config.json that shape the network, under diffusers' names."""

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> WanConfig:
        """From a parsed transformer/config.json. Raises ModelError: a missing field, or a variant not supported."""
        known = {field.name: values[field.name] for field in fields(WanConfig) if field.name in values}
        if values.get("image_dim") is not None or values.get("added_kv_proj_dim") is not None:
            raise ModelError("this Wan transformer attends to image embeddings, which is not supported yet")
        if values.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
            raise ModelError(f"Wan transformer: qk_norm rms_norm_across_heads expected, got {values['qk_norm']!r}")
        try:
            known["patch_size"] = tuple(known.get("patch_size", (1, 2, 2)))
            return WanConfig(**known)
        except TypeError as error:
            raise ModelError(f"Wan transformer config.json is incomplete: {error}") from error

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """The head dim's shares for frame, row and column."""
        spatial = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * spatial, spatial, spatial


class WanText(NamedTuple):
    """Conditioning: embeds (B, T, text_dim). Zero padding up to T = 512 is content that the reference attends to."""

    embeds: Tensor


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, with adaLN modulation around the first and the last."""

    def __init__(self, config: WanConfig, kernels: KernelSet, *, groups: SequenceGroups) -> None:
        super().__init__()
        width, heads, eps = config.width, config.num_attention_heads, config.eps
        self.kernels, self.eps = kernels, eps
        self.self_attention = SelfAttention(width, heads, eps, kernels, groups=groups)
        self.cross_norm = LayerNorm(width, eps, kernels) if config.cross_attn_norm else None
        self.cross_attention = CrossAttention(width, heads, eps, kernels)
        self.feed_forward = FeedForward(width, config.ffn_dim, width, kernels)
        self.modulation = nn.Parameter(torch.empty(1, 6, width), requires_grad=False)

    def forward(
        self, x: Tensor, text: Tensor, time: Tensor, rotary: Rotary, length: int, adapters: Adapters | None = None
    ) -> Tensor:
        """x: (B, S/sp, E), text: (B, T, E), time: (B, N, 6, E) with N 1 or S/sp, `length` S -> (B, S/sp, E)."""
        k = self.kernels
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + time.float()).unbind(2)
        normed = k.layer_norm_modulate(x, scale_a, shift_a, self.eps)
        attended = self.self_attention(normed, rotary, length, scoped(adapters, "self_attention"))
        x = k.gated_residual(x, attended, gate_a)
        normed = x if self.cross_norm is None else self.cross_norm(x)
        x = x + self.cross_attention(normed, text, scoped(adapters, "cross_attention"))
        normed = k.layer_norm_modulate(x, scale_f, shift_f, self.eps)
        return k.gated_residual(x, self.feed_forward(normed, scoped(adapters, "feed_forward")), gate_f)


class WanTransformer(nn.Module):
    """Predicts the velocity of the noised latents. Parameters are uninitialised until `weights.load_transformer`."""

    def __init__(self, config: WanConfig, mesh: ParallelMesh, kernels: KernelSet) -> None:
        super().__init__()
        self.config, self.kernels, self.groups = config, kernels, SequenceGroups.of(mesh)
        width, patch = config.width, config.patch_size
        volume = patch[0] * patch[1] * patch[2]
        self.rotary = Rope3D(config.rope_dims, config.rope_max_seq_len)
        self.patch_embedding = Linear(config.in_channels * volume, width)
        self.time_embedding = TimeEmbedding(config.freq_dim, width)
        self.time_projection = Linear(width, 6 * width)
        self.text_embedding = FeedForward(config.text_dim, width, width, kernels)
        self.blocks = nn.ModuleList(WanBlock(config, kernels, groups=self.groups) for _ in range(config.num_layers))
        self.modulation = nn.Parameter(torch.empty(1, 2, width), requires_grad=False)
        self.projection = Linear(width, config.out_channels * volume)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations between the float32 islands."""
        return next(self.text_embedding.parameters()).dtype

    def grid(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens along (frames, rows, columns) for latents (..., F, h, w). ValueError if a patch does not fit."""
        size, patch = shape[-3:], self.config.patch_size
        if any(n % p for n, p in zip(size, patch, strict=True)):
            raise ValueError(f"latents of (frames, height, width) {tuple(size)} do not divide by the patch {patch}")
        return size[0] // patch[0], size[1] // patch[1], size[2] // patch[2]

    def rope(self, shape: torch.Size | tuple[int, ...]) -> Rotary:
        """This rank's rotary table for latents (..., F, h, w): a caller that keeps it passes it to `forward`."""
        whole = self.rotary(self.grid(shape))
        return Rotary(*(self.groups.shard(table, dim=0) for table in whole))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: WanText,
        out: Tensor | None = None,
        *,
        rotary: Rotary | None = None,
        adapters: Adapters | None = None,
    ) -> Tensor:
        """latents: (B, C, F, h, w), timestep: (B,) or per token (B, S), conditioning.embeds: (B, T, text_dim)
        -> (B, C_out, F, h, w) in the latents' dtype, written to `out` when given."""
        grid = self.grid(latents.shape)
        rotary = self.rope(latents.shape) if rotary is None else rotary
        patches = patchify(latents.to(self.dtype), self.config.patch_size)
        length = patches.shape[1]
        x = self.patch_embedding(self.groups.shard(patches).contiguous(), adapters_of(adapters, "patch_embedding"))
        time, modulation = self._time(timestep, adapters)
        text = self.text_embedding(conditioning.embeds.to(self.dtype), scoped(adapters, "text_embedding"))
        for index, block in enumerate(self.blocks):
            x = block(x, text, modulation, rotary, length, scoped(adapters, f"blocks.{index}"))
        shift, scale = (self.modulation + time[:, :, None].float()).unbind(2)
        x = self.kernels.layer_norm_modulate(x, scale, shift, self.config.eps)
        x = self.groups.gather(self.projection(x, adapters_of(adapters, "projection")), length)
        prediction = unpatchify(x, grid, self.config.patch_size).to(latents.dtype)
        return prediction if out is None else out.copy_(prediction)

    def _time(self, timestep: Tensor, adapters: Adapters | None) -> tuple[Tensor, Tensor]:
        """timestep: (B,) or (B, S) -> embedding (B, N, E) and modulation (B, N, 6, E), N = 1 or this rank's share."""
        per_token = timestep[:, None] if timestep.ndim == 1 else self.groups.shard(timestep)
        time = self.time_embedding(per_token, scoped(adapters, "time_embedding")).to(self.dtype)
        projected = self.time_projection(F.silu(time), adapters_of(adapters, "time_projection"))
        return time, torch.unflatten(projected, 2, (6, -1))

    def compile_blocks(self) -> None:
        """Compiles the block once for all layers (one graph per latent shape; collectives break it)."""
        for block in self.blocks:
            block.compile(fullgraph=self.groups.alone, dynamic=False)
