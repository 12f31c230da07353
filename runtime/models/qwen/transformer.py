"""The Qwen-Image transformer, for text to image and for editing, from our layers.

Computes like diffusers' QwenImageTransformer2DModel: 60 double-stream blocks, in which text and image tokens have
weights of their own and share one attention. Pictures to edit are more image tokens behind those of the result, and no
prediction of theirs is kept. Norms, modulation and gates are float32 whatever the model's dtype, and so is the time
embedding. Modulation depends on the time alone and is made outside of the blocks (`layers.modulation`). When ranks
share the sequence, latents in and prediction out are whole on every rank; tokens are sharded in between
(`parallel.joint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.kernels.dispatch import KernelSet
from safelight.runtime.errors import ModelError
from safelight.runtime.layers.attention import JointAttention
from safelight.runtime.layers.block_pass import BlockPass
from safelight.runtime.layers.centred_rope import CentredRope, Grid
from safelight.runtime.layers.embeddings import FeedForward, TimeEmbedding, packed_to_latents, patchify
from safelight.runtime.layers.linear import Adapters, Linear, adapters_of, scoped
from safelight.runtime.layers.modulation import Modulation
from safelight.runtime.layers.norm import RMSNorm
from safelight.runtime.layers.rope import Rotary, joint_rotary
from safelight.runtime.parallel.joint import JointShare
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.parallel.sequence import SequenceGroups

_EPS = 1e-6
_FREQUENCIES = 256  # of the time embedding
_LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class QwenConfig:
    """The fields of transformer/config.json that shape the network, under diffusers' names.

    `zero_cond_t`: pictures to edit are modulated as at timestep 0 (Qwen-Image-Edit-2511).
    """

    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 60
    joint_attention_dim: int = 3584
    in_channels: int = 64
    out_channels: int = 16
    patch_size: int = 2
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> QwenConfig:
        """From a parsed transformer/config.json. Raises ModelError for a relative that is not supported."""
        for name in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"):
            if values.get(name):
                raise ModelError(f"Qwen transformer: {name} false expected, got {values[name]!r}")
        known = {field.name: values[field.name] for field in fields(QwenConfig) if field.name in values}
        known["axes_dims_rope"] = tuple(known.get("axes_dims_rope", (16, 56, 56)))
        config = QwenConfig(**known)
        volume = config.patch_size**2
        if (
            config.out_channels * volume != config.in_channels
            or sum(config.axes_dims_rope) != config.attention_head_dim
        ):
            raise ModelError(
                f"Qwen transformer config.json: in_channels of {volume} out_channels and axes_dims_rope that add up to "
                f"attention_head_dim expected, got {known}"
            )
        return config

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class QwenInputs(NamedTuple):
    """Conditioning. embeds: (B, T, text_dim), without padding; references: latents (B, C, 1, h_i, w_i) of the pictures
    to edit, in their order; modulation: rows of `QwenTransformer.modulate` for its `times`, when they were made before.
    """

    embeds: Tensor
    references: tuple[Tensor, ...] = ()
    modulation: Tensor | None = None


@dataclass(slots=True)
class _Pass:
    """A forward under way: tokens between two blocks, and what goes for all blocks."""

    text: Tensor
    image: Tensor
    modulation: tuple[Tensor, ...]  # of each block, and of the projection
    rotary: Rotary
    share: JointShare
    made: int
    grid: Grid  # of the result


class QwenBlock(nn.Module):
    """Joint attention, then a feed-forward layer for each kind of token, with adaLN modulation around both."""

    def __init__(self, config: QwenConfig, kernels: KernelSet, *, groups: SequenceGroups) -> None:
        super().__init__()
        width = config.width
        self.kernels = kernels
        self.attention = JointAttention(width, config.num_attention_heads, _EPS, kernels, groups=groups)
        self.feed_forward = FeedForward(width, 4 * width, width, kernels)
        self.text_feed_forward = FeedForward(width, 4 * width, width, kernels)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        share: JointShare,
        made: int,
        adapters: Adapters | None = None,
    ) -> tuple[Tensor, Tensor]:
        """text: (B, t, E), image: (B, s, E) of this rank, modulation: (B, N, 12, E) -> the same two shapes.

        Shift, scale and gate of attention and of the feed-forward layer, of image tokens and then of text. The first
        `made` image tokens are of the result; those behind them are modulated by the last of N.
        """
        of_image, of_text = modulation[:, :, :6].unbind(2), modulation[:, :1, 6:].unbind(2)
        x, y = self._normed(image, of_image[:2], made), self._normed(text, of_text[:2], made)
        y, x = self.attention(y, x, rotary, share, scoped(adapters, "attention"))
        image, text = self._added(image, x, of_image[2], made), self._added(text, y, of_text[2], made)
        x = self.feed_forward(self._normed(image, of_image[3:5], made), scoped(adapters, "feed_forward"))
        y = self.text_feed_forward(self._normed(text, of_text[3:5], made), scoped(adapters, "text_feed_forward"))
        return _finite(self._added(text, y, of_text[5], made)), _finite(self._added(image, x, of_image[5], made))

    def _normed(self, x: Tensor, shift_scale: tuple[Tensor, ...], made: int) -> Tensor:
        shift, scale = shift_scale
        if shift.shape[1] == 1:
            return self.kernels.layer_norm_modulate(x, scale, shift, _EPS)
        parts = (x[:, :made], scale[:, :1], shift[:, :1]), (x[:, made:], scale[:, 1:], shift[:, 1:])
        return torch.cat([self.kernels.layer_norm_modulate(*part, _EPS) for part in parts], dim=1)

    def _added(self, x: Tensor, y: Tensor, gate: Tensor, made: int) -> Tensor:
        if gate.shape[1] == 1:
            return self.kernels.gated_residual(x, y, gate)
        parts = (x[:, :made], y[:, :made], gate[:, :1]), (x[:, made:], y[:, made:], gate[:, 1:])
        return torch.cat([self.kernels.gated_residual(*part) for part in parts], dim=1)


class QwenTransformer(BlockPass[_Pass]):
    """Predicts the velocity of the noised latents. Parameters are uninitialised until `weights.load_transformer`."""

    def __init__(self, config: QwenConfig, mesh: ParallelMesh, kernels: KernelSet) -> None:
        super().__init__()
        self.config, self.kernels, self.groups = config, kernels, SequenceGroups.of(mesh)
        width = config.width
        self.rotary = CentredRope(config.axes_dims_rope)
        self.image_embedding = Linear(config.in_channels, width)
        self.text_norm = RMSNorm(config.joint_attention_dim, _EPS, kernels)
        self.text_embedding = Linear(config.joint_attention_dim, width)
        self.time_embedding = TimeEmbedding(_FREQUENCIES, width, scale=1000.0)
        self.modulation = Modulation(width, [*[12] * config.num_layers, 2])  # the last: of the projection
        self.blocks = nn.ModuleList(QwenBlock(config, kernels, groups=self.groups) for _ in range(config.num_layers))
        self.projection = Linear(width, config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations between the float32 islands."""
        return next(self.text_embedding.parameters()).dtype

    def grid(self, shape: torch.Size | tuple[int, ...]) -> Grid:
        """Rows and columns of tokens for latents (..., 1, h, w). ValueError if a patch does not fit."""
        (frames, *size), patch = shape[-3:], self.config.patch_size
        if frames != 1 or any(n % patch for n in size):
            raise ValueError(f"latents of one picture in multiples of {patch} expected, got {tuple(shape[-3:])}")
        return size[0] // patch, size[1] // patch

    def rope(self, grids: Sequence[Grid], text: int) -> Rotary:
        """This rank's rotary table for pictures of `grids`, the result first, and `text` text tokens: a caller that
        keeps it passes it to `forward`."""
        share = JointShare.of(self.groups, text, sum(rows * columns for rows, columns in grids))
        of_text, of_pictures = self.rotary(grids, text)
        return joint_rotary(of_text, of_pictures, share)

    def begin(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: QwenInputs,
        rotary: Rotary | None,
        adapters: Adapters | None,
    ) -> _Pass:
        """latents: (B, C, 1, h, w), timestep: (B,) of 1000."""
        pictures = (latents, *conditioning.references)
        grids = [self.grid(picture.shape) for picture in pictures]
        patch = (1, self.config.patch_size, self.config.patch_size)
        tokens = torch.cat([patchify(picture.to(self.dtype), patch) for picture in pictures], dim=1)
        length, embeds = grids[0][0] * grids[0][1], conditioning.embeds.to(self.dtype)
        share = JointShare.of(self.groups, embeds.shape[1], tokens.shape[1])
        rotary = self.rope(grids, embeds.shape[1]) if rotary is None else rotary
        text, image = share.shard(embeds, tokens)
        image = self.image_embedding(image.contiguous(), adapters_of(adapters, "image_embedding"))
        text = self.text_embedding(self.text_norm(text), adapters_of(adapters, "text_embedding"))
        modulation = conditioning.modulation
        if modulation is None:
            modulation = self.modulate(self.times(timestep, conditioning.references), adapters)
        made = max(0, min(image.shape[1], length - max(0, share.start - share.text)))
        return _Pass(text, image, self.modulation.split(modulation), rotary, share, made, grids[0])

    def advance(self, going: _Pass, block: nn.Module, index: int, adapters: Adapters | None) -> None:
        part = going.modulation[index]
        going.text, going.image = block(going.text, going.image, part, going.rotary, going.share, going.made, adapters)

    def end(self, done: _Pass, adapters: Adapters | None) -> Tensor:
        scale, shift = done.modulation[-1][:, :1].unbind(2)
        image = self.kernels.layer_norm_modulate(done.image, scale, shift, _EPS)
        image = done.share.gather_image(self.projection(image, adapters_of(adapters, "projection")))
        length, patch = done.grid[0] * done.grid[1], (1, self.config.patch_size, self.config.patch_size)
        return packed_to_latents(image[:, :length], (1, *done.grid), patch)

    def times(self, timestep: Tensor, references: Sequence[Tensor]) -> Tensor:
        """timestep: (B,) -> (B, N): N = 2, the second 0, when pictures to edit are modulated apart."""
        times = timestep[:, None]
        return torch.cat([times, torch.zeros_like(times)], dim=1) if self.times_of(references) == 2 else times

    def times_of(self, references: Sequence[Tensor]) -> int:
        """N, see `times`."""
        return 2 if self.config.zero_cond_t and references else 1

    def modulate(self, times: Tensor, adapters: Adapters | None = None) -> Tensor:
        """times: (B, N) of 1000 -> what modulates every block and the projection, (B, N, M, E) in the model's dtype."""
        embedded = self.time_embedding((times / 1000).float(), scoped(adapters, "time_embedding"))
        made: Tensor = self.modulation(F.silu(embedded.to(self.dtype)), scoped(adapters, "modulation"))
        return made

    def compile_blocks(self) -> None:
        """Compiles the block once for all layers; texts of another length need no graph of their own from the third
        length on (collectives break graphs)."""
        for block in self.blocks:
            block.compile(fullgraph=self.groups.alone)


def _finite(x: Tensor) -> Tensor:
    """float16 overflows in this network: cut off at its largest value, as in the reference."""
    return x.clamp(-_LARGEST_HALF, _LARGEST_HALF) if x.dtype == torch.float16 else x
