"""A VAE's folder -> diffusers' module with the published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from safelight.runtime.errors import ModelError
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json

_ENCODER = ("encoder", "quant_conv")


def load_autoencoder(
    folder: Path,
    kind: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    encoder: bool,
    config: dict[str, Any] | None = None,
) -> Any:
    """A `kind` (a diffusers autoencoder class), in eval mode; the encoder's half only if asked for.

    `config` replaces that of the folder's config.json. Raises ModelError naming the file and the tensor or setting.
    """
    path = folder / "config.json"
    values = read_json(path) if config is None else config
    found, patch = values.get("_class_name"), values.get("patch_size")
    if found != kind.__name__ or patch is not None:
        raise ModelError(
            f"{path}: {kind.__name__} without patch_size expected, got {found} with {patch}", param="vae_path"
        )
    try:
        with torch.device("meta"):
            module = kind.from_config(values)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(f"{path} does not describe a VAE: {error}", param="vae_path") from error
    unused = () if encoder else tuple(f"{part}." for part in _ENCODER)
    if not encoder:
        for part in _ENCODER:
            setattr(module, part, None)
    names = {name: (name,) for name, _ in module.named_parameters()}
    load_weights(
        module, checkpoint_files(folder), names, device, lambda _: dtype, ignored=lambda name: name.startswith(unused)
    )
    module.train(False)
    return module
