"""Decoding with the Wan VAE, one latent frame at a time: diffusers' AutoencoderKLWan with its causal cache outside.

The module is shared by all jobs and keeps nothing between calls: the feature cache travels in a cursor, a plain value,
so that decodes of several jobs interleave and a failed chunk can be decoded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d

from safelight.runtime.errors import ModelError
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json


@dataclass(frozen=True, slots=True)
class DecodeCursor:
    """Where a decode stands: the next latent frame, and per causal convolution the features it looks back at.

    An entry is a tensor (1, C, 1 or 2, h, w), None before the first frame, or the reference's marker "Rep".
    """

    frame: int
    features: tuple[torch.Tensor | str | None, ...]


@dataclass(frozen=True, slots=True)
class WanVae:
    """A loaded decoder. mean, inverse_std: (1, C, 1, 1, 1) in the module's dtype."""

    module: Any
    mean: torch.Tensor
    inverse_std: torch.Tensor
    convolutions: int

    def decode(self, latents: torch.Tensor, cursor: DecodeCursor | None) -> tuple[torch.Tensor, DecodeCursor | None]:
        """latents (C, F, h, w) float32 -> the next frames, uint8 (1 or 4, H, W, 3), and the cursor after them.

        The first latent frame gives one frame, each other one four. A None cursor starts; None comes back at the end.
        `cursor` is not changed. Equal to the frames of the reference's whole `vae.decode` and `postprocess_video`.
        """
        cursor = cursor or DecodeCursor(0, (None,) * self.convolutions)
        frame = latents[None, :, cursor.frame : cursor.frame + 1].to(self.mean.device, self.mean.dtype)
        features = list(cursor.features)
        pixels = self.module.decoder(
            self.module.post_quant_conv(frame / self.inverse_std + self.mean),
            feat_cache=features,
            feat_idx=[0],
            first_chunk=cursor.frame == 0,
        )
        following = cursor.frame + 1
        return to_uint8(pixels[0]), DecodeCursor(following, tuple(features)) if following < latents.shape[1] else None


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """(3, F, H, W) about [-1, 1] -> uint8 (F, H, W, 3), rounded as the reference: in `pixels`' dtype, then float32."""
    unit = (pixels.clamp(-1, 1) * 0.5 + 0.5).clamp(0, 1)
    return (unit.permute(1, 2, 3, 0).float() * 255).round().to(torch.uint8)


def load_wan_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> WanVae:
    """The decoder of the VAE in `folder`. Raises ModelError naming the file and the tensor or setting."""
    path = folder / "config.json"
    values = read_json(path)
    kind, patch = values.get("_class_name"), values.get("patch_size")
    if kind != "AutoencoderKLWan" or patch is not None:
        raise ModelError(
            f"{path}: AutoencoderKLWan without patch_size expected, got {kind} with {patch}", param="vae_path"
        )
    try:
        with torch.device("meta"):
            module = AutoencoderKLWan.from_config(values)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(f"{path} does not describe a VAE: {error}", param="vae_path") from error
    del module.encoder, module.quant_conv
    names = {name: (name,) for name, _ in module.named_parameters()}
    unused = ("encoder.", "quant_conv.")
    load_weights(
        module, checkpoint_files(folder), names, device, lambda _: dtype, ignored=lambda name: name.startswith(unused)
    )
    mean, std = (
        torch.tensor(module.config[key]).view(1, -1, 1, 1, 1).to(device, dtype)
        for key in ("latents_mean", "latents_std")
    )
    convolutions = sum(isinstance(child, WanCausalConv3d) for child in module.decoder.modules())
    module.train(False)
    return WanVae(module, mean, 1.0 / std, convolutions)
