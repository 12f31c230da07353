"""The VAE of Qwen-Image: the network of Wan 2.1's, layer for layer, with weights for pictures.

diffusers keeps it under a class of its own, AutoencoderKLQwenImage, whose tensors have the names of AutoencoderKLWan's
and give the same bits. So it is run as that, and cutting it into bands or over ranks is `vae/wan.py`'s.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from safelight.runtime.errors import ModelError
from safelight.runtime.models.loading import read_json
from safelight.runtime.models.vae.wan import WanVae, load_wan_vae

_CLASS = "AutoencoderKLQwenImage"


def load_qwen_vae(
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
    path = folder / "config.json"
    values = read_json(path)
    channels = values.pop("input_channels", 3)
    if values.get("_class_name") != _CLASS or channels != 3:
        raise ModelError(
            f"{path}: {_CLASS} with input_channels 3 expected, got {values.get('_class_name')} with {channels}",
            param="vae_path",
        )
    as_wan = values | {"_class_name": "AutoencoderKLWan"}
    return load_wan_vae(folder, device, dtype, encoder=encoder, band_rows=band_rows, group=group, config=as_wan)
