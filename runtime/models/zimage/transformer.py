"""The Z-Image transformer (arXiv 2511.22699), from our layers: a single stream of image and caption tokens.

Computes like diffusers' ZImageTransformer2DModel. What the caption goes through before it meets the image does not
depend on the timestep: `caption` is called once for a prompt, and `forward` takes its result. The time embedding and
all modulation are float32 whatever the model's dtype. When ranks share the sequence, latents in and prediction out are
whole on every rank.
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
from safelight.runtime.layers.block_pass import BlockPass
from safelight.runtime.layers.embeddings import timestep_sinusoids, unpatchify
from safelight.runtime.layers.linear import Adapters, Linear, adapters_of, scoped
from safelight.runtime.layers.norm import RMSNorm
from safelight.runtime.layers.rope import Rope3D, Rotary
from safelight.runtime.layers.single_stream import GatedFeedForward, HeadAttention
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.parallel.sequence import SequenceGroups
from safelight.runtime.parallel.single_stream import TokenShare

FREQUENCIES, TIME_HIDDEN, TIME_WIDTH = 256, 1024, 256  # of the time embedding
PATCH = (1, 2, 2)
MULTIPLE = 32  # to which image and caption are padded
_HEAD_EPS, _FINAL_EPS = 1e-5, 1e-6


def padded(tokens: int) -> int:
    """`tokens` and the learned padding after them."""
    return -(-tokens // MULTIPLE) * MULTIPLE


@dataclass(frozen=True, slots=True)
class ZImageConfig:
    """The fields of transformer/config.json that shape the network, under diffusers' names."""

    dim: int
    n_layers: int
    n_heads: int
    in_channels: int = 16
    n_refiner_layers: int = 2
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    axes_lens: tuple[int, int, int] = (1024, 512, 512)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> ZImageConfig:
        """From a parsed transformer/config.json. Raises ModelError: a missing field, or a variant not supported."""
        if values.get("siglip_feat_dim") is not None:
            raise ModelError("this Z-Image transformer reads picture features (omni), which is not supported")
        if not values.get("qk_norm", True):
            raise ModelError("Z-Image transformer: qk_norm expected, got none")
        patches = tuple(values.get("all_patch_size", (2,))), tuple(values.get("all_f_patch_size", (1,)))
        if patches != ((2,), (1,)):
            raise ModelError(f"Z-Image transformer: patches of 1x2x2 expected, got {patches}")
        known = {field.name: values[field.name] for field in fields(ZImageConfig) if field.name in values}
        for name in ("axes_dims", "axes_lens"):
            if name in known:
                known[name] = tuple(known[name])
        try:
            config = ZImageConfig(**known)
        except TypeError as error:
            raise ModelError(f"Z-Image transformer config.json is incomplete: {error}") from error
        if len(config.axes_dims) != 3 or sum(config.axes_dims) * config.n_heads != config.dim:
            raise ModelError(
                f"Z-Image transformer: three axes_dims that sum to a head's width expected, got {config.axes_dims} "
                f"with dim {config.dim} and {config.n_heads} heads"
            )
        return config

    @property
    def time_width(self) -> int:
        return min(self.dim, TIME_WIDTH)


class ZImageText(NamedTuple):
    """Conditioning: caption (B, T, E), what `ZImageTransformer.caption` made of a prompt; T is a multiple of 32."""

    caption: Tensor


class ZImageBlock(nn.Module):
    """`time`: width of the time embedding that scales and gates this block; None: the caption's, which has neither."""

    def __init__(
        self, width: int, heads: int, eps: float, kernels: KernelSet, *, time: int | None, groups: SequenceGroups
    ) -> None:
        super().__init__()
        self.kernels, self.eps = kernels, eps
        self.attention = HeadAttention(width, heads, _HEAD_EPS, kernels, groups=groups)
        self.feed_forward = GatedFeedForward(width, int(width / 3 * 8), kernels)
        self.before_attention, self.after_attention = RMSNorm(width, eps, kernels), RMSNorm(width, eps, kernels)
        self.before_feed_forward, self.after_feed_forward = RMSNorm(width, eps, kernels), RMSNorm(width, eps, kernels)
        self.modulation = None if time is None else Linear(time, 4 * width)

    def forward(
        self, x: Tensor, time: Tensor | None, rotary: Rotary, length: int, adapters: Adapters | None = None
    ) -> Tensor:
        """x: (B, S/sp, E), time: (B, 1, time width), `length` S -> (B, S/sp, E)."""
        attention, feed_forward = (scoped(adapters, name) for name in ("attention", "feed_forward"))
        if self.modulation is None or time is None:
            x = x + self.after_attention(self.attention(self.before_attention(x), rotary, length, attention))
            y: Tensor = x + self.after_feed_forward(self.feed_forward(self.before_feed_forward(x), feed_forward))
            return y
        k = self.kernels
        modulation = self.modulation(time, adapters_of(adapters, "modulation")).float()
        scale_a, gate_a, scale_f, gate_f = modulation.chunk(4, dim=-1)
        normed = k.rms_norm_scale(x, self.before_attention.weight, scale_a, self.eps)
        attended = self.attention(normed, rotary, length, attention)
        x = k.gated_rms_norm(x, attended, self.after_attention.weight, gate_a.tanh(), self.eps)
        normed = k.rms_norm_scale(x, self.before_feed_forward.weight, scale_f, self.eps)
        fed = self.feed_forward(normed, feed_forward)
        return k.gated_rms_norm(x, fed, self.after_feed_forward.weight, gate_f.tanh(), self.eps)


@dataclass(slots=True)
class _Pass:
    """A forward under way: tokens between two blocks, and what goes for all blocks."""

    x: Tensor
    time: Tensor
    rotary: Rotary
    share: TokenShare
    grid: tuple[int, int, int]


class ZImageTransformer(BlockPass[_Pass]):
    """Predicts the velocity of the noised latents. Parameters are uninitialised until `weights.load_transformer`."""

    def __init__(self, config: ZImageConfig, mesh: ParallelMesh, kernels: KernelSet) -> None:
        super().__init__()
        self.config, self.kernels, self.groups = config, kernels, SequenceGroups.of(mesh)
        width, time, eps = config.dim, config.time_width, config.norm_eps
        volume = PATCH[0] * PATCH[1] * PATCH[2]
        alone = SequenceGroups(None, None)
        self.rotary = Rope3D(config.axes_dims, max(config.axes_lens), config.rope_theta)
        self.time_in, self.time_out = Linear(FREQUENCIES, TIME_HIDDEN), Linear(TIME_HIDDEN, time)  # float32
        self.patch_embedding = Linear(config.in_channels * volume, width)
        self.image_pad = nn.Parameter(torch.empty(1, width), requires_grad=False)
        self.caption_norm = RMSNorm(config.cap_feat_dim, eps, kernels)
        self.caption_embedding = Linear(config.cap_feat_dim, width)
        self.caption_pad = nn.Parameter(torch.empty(1, width), requires_grad=False)
        refiners, heads = range(config.n_refiner_layers), config.n_heads
        self.noise_refiner = nn.ModuleList(
            ZImageBlock(width, heads, eps, kernels, time=time, groups=self.groups) for _ in refiners
        )
        self.context_refiner = nn.ModuleList(
            ZImageBlock(width, heads, eps, kernels, time=None, groups=alone) for _ in refiners
        )
        self.blocks = nn.ModuleList(
            ZImageBlock(width, heads, eps, kernels, time=time, groups=self.groups) for _ in range(config.n_layers)
        )
        self.final_modulation = Linear(time, width)
        self.projection = Linear(width, config.in_channels * volume)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations between the float32 islands."""
        return self.image_pad.dtype

    def grid(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens along (frames, rows, columns) for latents (..., F, h, w). ValueError if a patch does not fit."""
        size = shape[-3:]
        if any(n % p for n, p in zip(size, PATCH, strict=True)):
            raise ValueError(f"latents of (frames, height, width) {tuple(size)} do not divide by the patch {PATCH}")
        return size[0] // PATCH[0], size[1] // PATCH[1], size[2] // PATCH[2]

    def rope(self, shape: torch.Size | tuple[int, ...], caption: int) -> Rotary:
        """This rank's rotary table for latents (..., F, h, w) and T = `caption` tokens, image first: a caller that
        keeps it passes it to `forward`.

        A caption's token i is at (1 + i, 0, 0), its padding included; the image is a frame behind it. The image's
        padding is at (0, 0, 0).
        """
        grid = self.grid(shape)
        image = self.rotary(grid, (caption + 1, 0, 0))
        real = grid[0] * grid[1] * grid[2]
        padding = self.rotary((1, 1, 1))
        share = TokenShare.of(self.groups, padded(real), caption)
        text = self.rotary((caption, 1, 1), (1, 0, 0))
        tables = []
        for of_image, of_padding, of_text in zip(image, padding, text, strict=True):
            whole = torch.cat([of_image, of_padding.expand(share.image - real, -1)])
            tables.append(torch.cat([share.of_image(whole, dim=0), share.of_text(of_text, dim=0)]))
        return Rotary(*tables)

    def caption(self, embeds: Tensor, adapters: Adapters | None = None) -> Tensor:
        """embeds: (B, T', cap_feat_dim), a prompt's T' >= 1 hidden states -> (B, T, E), T the next multiple of 32.

        The same on every rank.
        """
        batch, length = embeds.shape[:2]
        x: Tensor = self.caption_norm(embeds.to(self.dtype))
        x = self.caption_embedding(x, adapters_of(adapters, "caption_embedding"))
        x = torch.cat([x, self.caption_pad.expand(batch, padded(length) - length, -1)], dim=1)
        rotary = self.rotary((x.shape[1], 1, 1), (1, 0, 0))
        for index, block in enumerate(self.context_refiner):
            x = block(x, None, rotary, x.shape[1], scoped(adapters, f"context_refiner.{index}"))
        return x

    def begin(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: ZImageText,
        rotary: Rotary | None,
        adapters: Adapters | None,
    ) -> _Pass:
        """timestep: (B,), 0 for noise and 1 for the picture, conditioning.caption: (B, T, E)."""
        caption = conditioning.caption.to(self.dtype)
        grid = self.grid(latents.shape)
        real = grid[0] * grid[1] * grid[2]
        share = TokenShare.of(self.groups, padded(real), caption.shape[1])
        rotary = self.rope(latents.shape, caption.shape[1]) if rotary is None else rotary
        of_image = Rotary(*(table[: share.image_size] for table in rotary))
        time = self._time(timestep, adapters)
        x = self._image(_patches(latents.to(self.dtype)), share, real, adapters)
        for index, block in enumerate(self.noise_refiner):
            x = block(x, time, of_image, share.image, scoped(adapters, f"noise_refiner.{index}"))
        return _Pass(torch.cat([x, share.of_text(caption)], dim=1), time, rotary, share, grid)

    def advance(self, going: _Pass, block: nn.Module, index: int, adapters: Adapters | None) -> None:
        going.x = block(going.x, going.time, going.rotary, going.share.length, adapters)

    def end(self, done: _Pass, adapters: Adapters | None) -> Tensor:
        """picture - noise, (B, C, F, h, w)."""
        share, (frames, rows, columns) = done.share, done.grid
        scale = self.final_modulation(F.silu(done.time), adapters_of(adapters, "final_modulation")).float()
        x = done.x[:, : share.image_size]
        x = self.kernels.layer_norm_modulate(x, scale, torch.zeros_like(scale), _FINAL_EPS)
        x = self.groups.gather(self.projection(x, adapters_of(adapters, "projection")), share.image)
        return unpatchify(x[:, : frames * rows * columns], done.grid, PATCH)

    def _time(self, timestep: Tensor, adapters: Adapters | None) -> Tensor:
        """(B,) -> (B, 1, time width), in the model's dtype."""
        x = timestep_sinusoids(timestep.float()[:, None] * self.config.t_scale, FREQUENCIES)
        x = F.silu(self.time_in(x, adapters_of(adapters, "time_in")))
        embedded: Tensor = self.time_out(x, adapters_of(adapters, "time_out"))
        return embedded.to(self.dtype)

    def _image(self, patches: Tensor, share: TokenShare, real: int, adapters: Adapters | None) -> Tensor:
        """(B, S, C 4) of the picture -> this rank's embedded tokens, learned padding included."""
        own = max(0, min(share.image_size, real - share.image_start))
        rows = patches.narrow(1, min(share.image_start, real), own)
        x = self.patch_embedding(rows.contiguous(), adapters_of(adapters, "patch_embedding"))
        return torch.cat([x, self.image_pad.expand(x.shape[0], share.image_size - own, -1)], dim=1)

    def compile_blocks(self) -> None:
        """Compiles the block once for all layers. The first length gets a graph of its own, all others share one
        (collectives break it)."""
        for block in (*self.noise_refiner, *self.context_refiner, *self.blocks):
            block.compile(fullgraph=self.groups.alone)


def _patches(latents: Tensor) -> Tensor:
    """(B, C, F, h, w) -> (B, S, pf ph pw C), as `unpatchify` takes them apart."""
    b, c, f, h, w = latents.shape
    pf, ph, pw = PATCH
    x = latents.view(b, c, f // pf, pf, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, -1, pf * ph * pw * c)
