"""The Wan VAE, one latent frame at a time: diffusers' AutoencoderKLWan with its causal cache outside.

The module is shared by all jobs and keeps nothing between calls: the feature cache travels in a cursor, a plain value,
so that decodes of several jobs interleave and a failed chunk can be decoded again. With a process group the ranks share
each frame (`parallel.vae`); then every rank must make the same calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d

from safelight.runtime.errors import ModelError
from safelight.runtime.models.vae.loading import load_autoencoder
from safelight.runtime.models.vae.pixels import to_uint8
from safelight.runtime.models.vae.tiles import band_dim, decode_wan_bands
from safelight.runtime.parallel.vae import Cut, cut_for, shared


@dataclass(frozen=True, slots=True)
class DecodeCursor:
    """Where a decode stands: the next latent frame, and per causal convolution the features it looks back at.

    An entry is a tensor (1, C, 1 or 2, h, w) of this rank's rows, None before the first frame, or the reference's
    marker "Rep". With bands: the entries of what is done whole, then those of each band.
    """

    frame: int
    features: tuple[torch.Tensor | str | None, ...]


@dataclass(frozen=True, slots=True)
class WanVae:
    """A loaded VAE. mean, inverse_std: (1, C, 1, 1, 1) in the module's dtype.

    `band_rows`: decode in bands of at most so many latent rows (None: in one piece).
    """

    module: Any
    mean: torch.Tensor
    inverse_std: torch.Tensor
    group: dist.ProcessGroup | None = None
    band_rows: int | None = None

    def decode(self, latents: torch.Tensor, cursor: DecodeCursor | None) -> tuple[torch.Tensor, DecodeCursor | None]:
        """latents (C, F, h, w) float32 -> the next frames, uint8 (1 or 4, H, W, 3), and the cursor after them.

        The first latent frame gives one frame, each other one four. A None cursor starts; None comes back at the end.
        `cursor` is not changed. Equal to the frames of the reference's whole `vae.decode` and `postprocess_video`, on
        every rank.
        """
        cut = cut_for(*latents.shape[-2:], group=self.group)
        pixels, following = self.decode_share(latents, cursor, cut)
        frames = to_uint8(pixels)
        return frames if cut is None else cut.gather(frames, dim=cut.dim - 1), following

    def decode_share(
        self, latents: torch.Tensor, cursor: DecodeCursor | None, cut: Cut | None
    ) -> tuple[torch.Tensor, DecodeCursor | None]:
        """As `decode`, without gathering and rounding: this rank's rows of the frames, (3, 1 or 4, H, W)."""
        count, dim = self._bands(latents, cut)
        if cursor is None:
            convolutions = sum(isinstance(child, WanCausalConv3d) for child in self.module.decoder.modules())
            cursor = DecodeCursor(0, (None,) * convolutions * (1 if count == 1 else 1 + count))
        features = list(cursor.features) if latents.shape[1] > 1 else None
        frame = latents[None, :, cursor.frame : cursor.frame + 1].to(self.mean.device, self.mean.dtype)
        with shared(cut):
            x = frame if cut is None else cut.share(frame)
            x = self.module.post_quant_conv(x / self.inverse_std + self.mean)
            if count > 1:
                pixels = decode_wan_bands(self.module.decoder, x, features, dim=dim, count=count)
            else:
                pixels = self.module.decoder(x, feat_cache=features, feat_idx=[0], first_chunk=cursor.frame == 0)
        following = cursor.frame + 1
        left = features is not None and following < latents.shape[1]
        return pixels[0], DecodeCursor(following, tuple(features or ())) if left else None

    def _bands(self, latents: torch.Tensor, cut: Cut | None) -> tuple[int, int]:
        """How many bands, along which dim."""
        dim = band_dim((latents.shape[-2], latents.shape[-1]), cut)
        return (1 if self.band_rows is None else -(-latents.shape[dim] // self.band_rows)), dim

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Frames (3, F, H, W) in [-1, 1] -> normalised latents (C, 1 + (F - 1) / 4, H / 8, W / 8) float32, the mean of
        the posterior, whole on every rank. Needs a VAE loaded with its encoder.

        Raises ValueError for another frame count or size than the architecture has latents for.
        """
        config = self.module.config
        scale = 2 ** (len(config.dim_mult) - 1)
        frames, height, width = video.shape[1:]
        if frames % 4 != 1 or height % scale or width % scale:
            raise ValueError(f"4n + 1 frames in multiples of {scale} pixels expected, got {frames} of {width}x{height}")
        cut = cut_for(height // scale, width // scale, group=self.group)
        features = [None] * sum(isinstance(child, WanCausalConv3d) for child in self.module.encoder.modules())
        encoded = []
        with shared(cut):
            x = video[None].to(self.mean.device, self.mean.dtype)
            x = x if cut is None else cut.share(x, scale=scale)
            for chunk in torch.split(x, [1] + [4] * (frames // 4), dim=2):
                encoded.append(self.module.encoder(chunk, feat_cache=features, feat_idx=[0]))
            mean = self.module.quant_conv(torch.cat(encoded, 2)).chunk(2, dim=1)[0]
        latents = ((mean - self.mean) * self.inverse_std)[0].float()
        return latents if cut is None else cut.gather(latents)


def load_wan_vae(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    encoder: bool = False,
    band_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> WanVae:
    """The VAE in `folder`, of which the encoder only if asked for. Raises ModelError naming the file and the tensor or
    setting."""
    module = load_autoencoder(folder, AutoencoderKLWan, device, dtype, encoder=encoder)
    if band_rows is not None and module.config.is_residual:
        raise ModelError(f"{folder} is a Wan 2.2 VAE, which --vae-tiling cannot cut", param="vae_tiling")
    mean, std = (
        torch.tensor(module.config[key]).view(1, -1, 1, 1, 1).to(device, dtype)
        for key in ("latents_mean", "latents_std")
    )
    return WanVae(module, mean, 1.0 / std, group, band_rows)
