"""What decoding a picture with an AutoencoderKL costs (FLUX.1, Z-Image), from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_BYTES = 4  # float32, so half is spare in bfloat16


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """`peak_bytes` counts six activations of the largest level."""

    flop: float
    peak_bytes: int


def spatial_scale(vae: Mapping[str, Any]) -> int:
    """Pixels of a latent's side."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def decode_cost(vae: Mapping[str, Any], h: int, w: int) -> DecodeCost:
    """A latent of (h, w) through the decoder's levels.

    FLOP: 2 * 9 * C_in * C_out a pixel of each 3x3 convolution, two in a residual block, and 2 * C_in * C_out where its
    width changes; upsampling convolutions on top; the middle attends over all h w positions with one head of C.
    """
    blocks, channels = int(vae["layers_per_block"]) + 1, [int(c) for c in reversed(vae["block_out_channels"])]
    area, widest = h * w, channels[0]
    flop = 18.0 * area * (int(vae["latent_channels"]) * widest + 4 * widest * widest)
    flop += 8.0 * area * widest * widest + 4.0 * area * area * widest
    largest = area * widest
    for level, (source, target) in enumerate(pairwise([widest, *channels])):
        flop += 18.0 * area * (source * target + (2 * blocks - 1) * target * target)
        flop += 2.0 * area * source * target * (source != target)
        largest = max(largest, area * max(source, target))
        if level < len(channels) - 1:
            area *= 4
            flop += 18.0 * area * target * target
            largest = max(largest, area * target)
    return DecodeCost(flop + 18.0 * area * channels[-1] * 3, 6 * _BYTES * largest)
