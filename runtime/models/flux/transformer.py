"""The FLUX.1 transformer, from our layers: double-stream blocks, then single-stream blocks.

Computes like diffusers' FluxTransformer2DModel, with more float32: embeddings of time, guidance and pooled text,
modulation, gates, norms and rotary positions. Modulation, of the time, the guidance and the prompt's gist, is made
outside of the blocks (`layers.modulation`). When ranks share the sequence, latents in and prediction out are whole on
every rank; text and image tokens are sharded in between as one sequence (`JointShare`).
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
from safelight.runtime.layers.attention import JointAttention
from safelight.runtime.layers.embeddings import FeedForward, TimeEmbedding, packed_to_latents, patchify
from safelight.runtime.layers.linear import Adapters, Linear, adapters_of, scoped
from safelight.runtime.layers.modulation import Modulation
from safelight.runtime.layers.norm import HeadNorm
from safelight.runtime.layers.rope import Rope3D, Rotary, joint_rotary
from safelight.runtime.parallel.joint import JointShare
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.parallel.sequence import SequenceGroups

EPS, FREQUENCIES, PATCH = 1e-6, 256, (1, 2, 2)
MAX_POSITIONS = 512  # along an axis: 8,192 pixels


@dataclass(frozen=True, slots=True)
class FluxConfig:
    """The fields of transformer/config.json that shape the network, under diffusers' names."""

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    num_layers: int
    num_single_layers: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> FluxConfig:
        """From a parsed transformer/config.json. Raises ModelError: a missing field, or a variant not supported."""
        known = {field.name: values[field.name] for field in fields(FluxConfig) if field.name in values}
        if values.get("patch_size", 1) != 1 or values.get("out_channels") not in (None, values.get("in_channels")):
            raise ModelError("FLUX transformer: patch_size 1 and as many output as input channels expected")
        try:
            known["axes_dims_rope"] = tuple(known.get("axes_dims_rope", (16, 56, 56)))
            made = FluxConfig(**known)
        except TypeError as error:
            raise ModelError(f"FLUX transformer config.json is incomplete: {error}") from error
        if sum(made.axes_dims_rope) != made.attention_head_dim:
            raise ModelError(
                f"FLUX transformer: axes_dims_rope {made.axes_dims_rope} must add up to attention_head_dim "
                f"{made.attention_head_dim}"
            )
        return made

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class FluxText(NamedTuple):
    """Conditioning: embeds (B, T, joint_attention_dim), whose padding the reference attends to; pooled (B, P);
    guidance (B,) float32, for models that embed it; or, in place of these two, modulation: rows of
    `FluxTransformer.modulate`, made before."""

    embeds: Tensor
    pooled: Tensor | None = None
    guidance: Tensor | None = None
    modulation: Tensor | None = None


class DoubleBlock(nn.Module):
    """Text and image with weights of their own, and one attention over both."""

    def __init__(self, config: FluxConfig, kernels: KernelSet, *, groups: SequenceGroups) -> None:
        super().__init__()
        width = config.width
        self.kernels = kernels
        self.attention = JointAttention(width, config.num_attention_heads, EPS, kernels, groups=groups)
        self.feed_forward = FeedForward(width, 4 * width, width, kernels)
        self.text_feed_forward = FeedForward(width, 4 * width, width, kernels)

    def forward(
        self, text: Tensor, image: Tensor, modulation: Tensor, rotary: Rotary, share: JointShare,
        adapters: Adapters | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """text: (B, t, E), image: (B, s, E), modulation: (B, 1, 12, E) -> the same two shapes.

        Shift, scale and gate of attention and of the feed-forward layer, of image tokens and then of text.
        """
        k = self.kernels
        ours, texts = modulation[:, :, :6].unbind(2), modulation[:, :, 6:].unbind(2)
        added = self.attention(
            k.layer_norm_modulate(text, texts[1], texts[0], EPS),
            k.layer_norm_modulate(image, ours[1], ours[0], EPS),
            rotary,
            share,
            scoped(adapters, "attention"),
        )
        text, image = k.gated_residual(text, added[0], texts[2]), k.gated_residual(image, added[1], ours[2])
        normed = k.layer_norm_modulate(image, ours[4], ours[3], EPS)
        image = k.gated_residual(image, self.feed_forward(normed, scoped(adapters, "feed_forward")), ours[5])
        normed = k.layer_norm_modulate(text, texts[4], texts[3], EPS)
        text = k.gated_residual(text, self.text_feed_forward(normed, scoped(adapters, "text_feed_forward")), texts[5])
        return _finite(text), image


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side over text and image tokens as one stream.

    `up` is q, k, v and the feed-forward layer's first matrix in one; `down` reads what both give.
    """

    def __init__(self, config: FluxConfig, kernels: KernelSet, *, groups: SequenceGroups) -> None:
        super().__init__()
        width, self.heads = config.width, config.num_attention_heads
        self.kernels, self.groups = kernels, groups
        self.up = Linear(width, 7 * width)
        self.norm_q, self.norm_k = (HeadNorm(config.attention_head_dim, EPS, kernels) for _ in range(2))
        self.down = Linear(5 * width, width)

    def forward(
        self, x: Tensor, modulation: Tensor, rotary: Rotary, length: int, adapters: Adapters | None = None
    ) -> Tensor:
        """x: (B, t + s, E), modulation: (B, 1, 3, E), shift, scale and gate, `length`: T + S -> (B, t + s, E)."""
        k = self.kernels
        shift, scale, gate = modulation.unbind(2)
        width = x.shape[-1]
        up = self.up(k.layer_norm_modulate(x, scale, shift, EPS), adapters_of(adapters, "up"))
        q, key, v, hidden = up.split((width, width, width, 4 * width), dim=-1)
        attended = self.groups.attention(
            self.norm_q(q, *rotary),
            self.norm_k(key, *rotary),
            torch.unflatten(v, 2, (self.heads, width // self.heads)),
            length,
            k,
        )
        both = k.gelu_beside(attended.flatten(2), hidden)
        return _finite(k.gated_residual(x, self.down(both, adapters_of(adapters, "down")), gate))


def _finite(x: Tensor) -> Tensor:
    """float16 has not the range of these streams: the reference cuts off what overflows."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


class FluxTransformer(nn.Module):
    """Predicts the velocity of the noised latents. Parameters are uninitialised until `weights.load_transformer`."""

    def __init__(self, config: FluxConfig, mesh: ParallelMesh, kernels: KernelSet) -> None:
        super().__init__()
        self.config, self.kernels, self.groups = config, kernels, SequenceGroups.of(mesh)
        width = config.width
        self.rotary = Rope3D(config.axes_dims_rope, MAX_POSITIONS)
        self.image_embedding = Linear(config.in_channels, width)
        self.text_embedding = Linear(config.joint_attention_dim, width)
        self.time_embedding = TimeEmbedding(FREQUENCIES, width)
        self.guidance_embedding = TimeEmbedding(FREQUENCIES, width) if config.guidance_embeds else None
        self.pooled_in, self.pooled_out = Linear(config.pooled_projection_dim, width), Linear(width, width)
        counts = [*[12] * config.num_layers, *[3] * config.num_single_layers, 2]  # the last: of the projection
        self.modulation = Modulation(width, counts)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(config, kernels, groups=self.groups) for _ in range(config.num_layers)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(config, kernels, groups=self.groups) for _ in range(config.num_single_layers)
        )
        self.projection = Linear(width, config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations between the float32 islands."""
        return next(self.image_embedding.parameters()).dtype

    def rope(self, shape: torch.Size | tuple[int, ...], text: int) -> Rotary:
        """This rank's rotary table, text first, for latents (..., 1, h, w) and `text` tokens, which are all at position
        0: a caller that keeps it passes it to `forward`."""
        image = self.rotary((1, shape[-2] // PATCH[1], shape[-1] // PATCH[2]))
        at_zero = Rotary(*(table[:1].expand(text, -1) for table in self.rotary((1, 1, 1))))
        return joint_rotary(at_zero, image, JointShare.of(self.groups, text, image.cos.shape[0]))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: FluxText,
        out: Tensor | None = None,
        *,
        rotary: Rotary | None = None,
        adapters: Adapters | None = None,
    ) -> Tensor:
        """latents: (B, C, 1, h, w) with h and w even, timestep: (B,) of 0 to 1000 -> (B, C, 1, h, w) in the latents'
        dtype, written to `out` when given."""
        patches, embeds = patchify(latents.to(self.dtype), PATCH), conditioning.embeds.to(self.dtype)
        share = JointShare.of(self.groups, embeds.shape[1], patches.shape[1])
        rotary = self.rope(latents.shape, embeds.shape[1]) if rotary is None else rotary
        own_text, own_image = share.shard(embeds, patches)
        text = self.text_embedding(own_text, adapters_of(adapters, "text_embedding"))
        image = self.image_embedding(own_image, adapters_of(adapters, "image_embedding"))
        modulation = conditioning.modulation
        if modulation is None:
            assert conditioning.pooled is not None, "modulation, or what it is made of"
            modulation = self.modulate(timestep, conditioning.pooled, conditioning.guidance, adapters)
        parts = iter(self.modulation.split(modulation))
        for index, block in enumerate(self.double_blocks):
            text, image = block(text, image, next(parts), rotary, share, scoped(adapters, f"double_blocks.{index}"))
        x = torch.cat([text, image], dim=1)
        for index, block in enumerate(self.single_blocks):
            x = block(x, next(parts), rotary, share.length, scoped(adapters, f"single_blocks.{index}"))
        scale, shift = next(parts).unbind(2)
        image = self.kernels.layer_norm_modulate(share.split(x)[1], scale, shift, EPS)
        tokens = share.gather_image(self.projection(image, adapters_of(adapters, "projection")))
        grid = (1, latents.shape[-2] // PATCH[1], latents.shape[-1] // PATCH[2])
        prediction = packed_to_latents(tokens, grid, PATCH).to(latents.dtype)
        return prediction if out is None else out.copy_(prediction)

    def modulate(
        self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None, adapters: Adapters | None = None
    ) -> Tensor:
        """timestep: (B,), pooled: (B or 1, P), guidance: (B or 1,) float32 -> what modulates every block and the
        projection, (B, 1, M, E) in the model's dtype."""
        time = self.time_embedding(timestep[:, None], scoped(adapters, "time_embedding"))
        if self.guidance_embedding is not None:
            assert guidance is not None, "this model embeds the guidance scale"
            scale = guidance.float()[:, None] * 1000
            time = time + self.guidance_embedding(scale, scoped(adapters, "guidance_embedding"))
        gist = self.pooled_in(pooled.float()[:, None], adapters_of(adapters, "pooled_in"))
        time = time + self.pooled_out(F.silu(gist), adapters_of(adapters, "pooled_out"))
        made: Tensor = self.modulation(F.silu(time).to(self.dtype), scoped(adapters, "modulation"))
        return made

    def compile_blocks(self) -> None:
        """Compiles one block of each kind for all layers (a graph per latent shape; collectives break it)."""
        for block in (*self.double_blocks, *self.single_blocks):
            block.compile(fullgraph=self.groups.alone, dynamic=False)
