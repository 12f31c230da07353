"""The 2D VAE of the image families: diffusers' AutoencoderKL.

With a process group the ranks share the picture (`parallel.vae`); then every rank must make the same calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from safelight.runtime.models.vae.loading import load_autoencoder
from safelight.runtime.models.vae.pixels import to_uint8
from safelight.runtime.models.vae.tiles import band_dim, decode_kl_bands
from safelight.runtime.parallel.vae import cut_for, shared


@dataclass(frozen=True, slots=True)
class KlVae:
    """A loaded VAE. `band_rows`: decode in bands of at most so many latent rows (tiles.KL_BAND_ROWS;
    None: in one piece)."""

    module: Any
    group: dist.ProcessGroup | None = None
    band_rows: int | None = None

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) about [-1, 1] in the module's dtype, whole on every
        rank. Equal to the reference's `vae.decode(latents / scaling_factor + shift_factor)`."""
        height, width = latents.shape[-2:]
        cut = cut_for(height, width, group=self.group)
        x = latents.to(self.module.device, self.module.dtype) / self.module.config.scaling_factor + self._shift
        dim = band_dim((height, width), cut)
        with shared(cut):
            x = x if cut is None else cut.share(x)
            x = self.module.post_quant_conv(x) if self.module.post_quant_conv is not None else x
            if self.band_rows is None:
                pixels: torch.Tensor = self.module.decoder(x)
            else:
                count = -(-latents.shape[dim] // self.band_rows)
                pixels = decode_kl_bands(self.module.decoder, x, dim=dim, count=count, cut=cut)
        return pixels if cut is None else cut.gather(pixels)

    def decode(self, latents: torch.Tensor, cursor: None = None) -> tuple[torch.Tensor, None]:
        """Scaled latents (C, 1, h, w) of one picture -> uint8 (1, H, W, 3), whole on every rank, in one chunk."""
        return to_uint8(self.pixels(latents.transpose(0, 1)).transpose(0, 1)), None

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w) float32, the mean of the posterior, whole on
        every rank. Needs a VAE loaded with its encoder. Raises ValueError for a size without latents."""
        config = self.module.config
        scale = 2 ** (len(config.block_out_channels) - 1)
        height, width = pixels.shape[-2:]
        if height % scale or width % scale:
            raise ValueError(f"multiples of {scale} pixels expected, got {width}x{height}")
        cut = cut_for(height // scale, width // scale, group=self.group)
        x = pixels.to(self.module.device, self.module.dtype)
        with shared(cut):
            moments = self.module.encoder(x if cut is None else cut.share(x, scale=scale))
            moments = self.module.quant_conv(moments) if self.module.quant_conv is not None else moments
        latents = ((moments.chunk(2, dim=1)[0] - self._shift) * config.scaling_factor).float()
        return latents if cut is None else cut.gather(latents)

    @property
    def _shift(self) -> float:
        return float(self.module.config.shift_factor or 0.0)


def load_kl_vae(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    encoder: bool = False,
    band_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> KlVae:
    """The VAE in `folder`, of which the encoder only if asked for. Raises ModelError naming the file and the tensor or
    setting."""
    return KlVae(load_autoencoder(folder, AutoencoderKL, device, dtype, encoder=encoder), group, band_rows)
