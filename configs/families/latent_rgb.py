"""How the channels of a VAE's latents look as colours: a linear map that makes small pictures of unfinished latents.

rgb = latent @ matrix + bias in [-1, 1], of latents as the transformer sees them (normalised by the VAE's mean and
std, or shift and scale). The published factors are those of ComfyUI's comfy/latent_formats.py (classes Wan21 and Flux);
scripts/fit_preview.py computes those of any other VAE and writes them beside its weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safelight.runtime.errors import ModelError

# In a VAE's folder: {"matrix": [[r, g, b] for each channel], "bias": [r, g, b], "later": {...} of a causal video VAE}
FILE = "preview.json"
Rgb = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class LatentRgb:
    """`matrix`: one row for each latent channel. `later`: of latent frames after the first, which stand for several
    frames, and which a causal video VAE may encode in another way; None: as the first."""

    matrix: tuple[Rgb, ...]
    bias: Rgb
    later: LatentRgb | None = None


WAN_2_1 = LatentRgb(  # Qwen-Image has the same latents
    (
        (-0.1299, -0.1692, 0.2932),
        (0.0671, 0.0406, 0.0442),
        (0.3568, 0.2548, 0.1747),
        (0.0372, 0.2344, 0.1420),
        (0.0313, 0.0189, -0.0328),
        (0.0296, -0.0956, -0.0665),
        (-0.3477, -0.4059, -0.2925),
        (0.0166, 0.1902, 0.1975),
        (-0.0412, 0.0267, -0.1364),
        (-0.1293, 0.0740, 0.1636),
        (0.0680, 0.3019, 0.1128),
        (0.0032, 0.0581, 0.0639),
        (-0.1251, 0.0927, 0.1699),
        (0.0060, -0.0633, 0.0005),
        (0.3477, 0.2275, 0.2950),
        (0.1984, 0.0913, 0.1861),
    ),
    (-0.1835, -0.0868, -0.3360),
)
FLUX_1 = LatentRgb(  # Z-Image has the same VAE
    (
        (-0.0346, 0.0244, 0.0681),
        (0.0034, 0.0210, 0.0687),
        (0.0275, -0.0668, -0.0433),
        (-0.0174, 0.0160, 0.0617),
        (0.0859, 0.0721, 0.0329),
        (0.0004, 0.0383, 0.0115),
        (0.0405, 0.0861, 0.0915),
        (-0.0236, -0.0185, -0.0259),
        (-0.0245, 0.0250, 0.1180),
        (0.1008, 0.0755, -0.0421),
        (-0.0515, 0.0201, 0.0011),
        (0.0428, -0.0012, -0.0036),
        (0.0817, 0.0765, 0.0749),
        (-0.1264, -0.0522, -0.1103),
        (-0.0280, -0.0881, -0.0499),
        (-0.1262, -0.0982, -0.0778),
    ),
    (-0.0329, -0.0718, -0.0851),
)
_WAN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_WAN_CLASSES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")


def factors_of(vae: Path) -> LatentRgb | None:
    """The factors of the VAE in a folder: of its own file, or published ones if its config.json has the normalisation
    of a published VAE. None: they are not known. Raises ModelError for a file that is none."""
    config = _config(vae)
    path = vae / FILE
    if path.is_file():
        return _read(path, config.get("z_dim", config.get("latent_channels")))
    kind = config.get("_class_name")
    if kind in _WAN_CLASSES and config.get("z_dim", 16) == 16:
        mean = config.get("latents_mean", _WAN_MEAN)  # which is the classes' default
        return WAN_2_1 if _near(mean, _WAN_MEAN) else None
    if kind == "AutoencoderKL" and config.get("latent_channels") == 16:
        scale = (config.get("scaling_factor"), config.get("shift_factor"))
        return FLUX_1 if _near(scale, (0.3611, 0.1159)) else None
    return None


def _near(values: Any, published: Sequence[float]) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == len(published)
        and all(isinstance(v, int | float) and abs(v - p) < 1e-4 for v, p in zip(values, published, strict=True))
    )


def _config(vae: Path) -> Mapping[str, Any]:
    try:
        values = json.loads((vae / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever loads it says what is wrong
    return values if isinstance(values, dict) else {}


def _read(path: Path, channels: int | None) -> LatentRgb:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        first = _factors(values, channels)
        return first if "later" not in values else replace(first, later=_factors(values["later"], channels))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: an object with matrix (three numbers for each channel) and bias (three) expected: {error}; "
            "make it again with scripts/fit_preview.py",
            param="model_path",
        ) from error


def _factors(values: Any, channels: int | None) -> LatentRgb:
    rows = [_rgb(row) for row in (*values["matrix"], values["bias"])]
    if len(rows) - 1 != (channels or len(rows) - 1) or len(rows) < 2:
        raise ValueError(f"{len(rows) - 1} channels in the matrix, the VAE has {channels}")
    return LatentRgb(tuple(rows[:-1]), rows[-1])


def _rgb(row: Any) -> Rgb:
    red, green, blue = row
    return float(red), float(green), float(blue)
