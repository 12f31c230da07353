"""Decoding a large picture in bands of rows, exactly, to hold less in memory at once.

Wan: what is attended to over the whole picture is done whole, at latent resolution, where it is small. From there on
the bands are independent: each takes along the rows around it that its result depends on, and every layer's result is
cut to what the layers after it still need, 13 latent rows a side at first and one pixel row in the end (Wan 2.1).

AutoencoderKL: its group norms need each layer whole before the next can start, so here the bands are within a layer:
activations are whole, and what lies between two of them (normalised, activated, padded) exists for one band only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor

from safelight.runtime.parallel.ulysses import split_sizes
from safelight.runtime.parallel.vae import Cut, group_affine

WAN_BAND_ROWS = 32  # latent rows of a band: 256 pixel rows, next to which the rows around it are few
KL_BAND_ROWS = 8


def band_dim(size: tuple[int, int], cut: Cut | None) -> int:
    """The side to cut into bands: the one that the ranks do not share; on one rank the longer one."""
    if cut is not None:
        return -1 if cut.dim == -2 else -2
    return -1 if size[1] > size[0] else -2


def bands(rows: int, count: int) -> list[tuple[int, int]]:
    """[0, rows) in `count` bands, as even as can be: (begin, end) of each."""
    return list(pairwise([0, *accumulate(split_sizes(rows, count))]))


def decode_wan_bands(decoder: Any, x: Tensor, features: list[Any] | None, *, dim: int, count: int) -> Tensor:
    """`decoder(x)` for x (1, C, 1, h, w), in `count` bands along `dim` (-2 or -1).

    features: the causal cache, as many entries for what is done whole and then for each band; replaced in place.
    None: there is no frame before and none after.
    """
    slots = len(features) // (1 + count) if features is not None else 0
    parts: list[Tensor] = []
    for number, (begin, end) in enumerate([(0, x.shape[dim]), *bands(x.shape[dim], count)]):
        own = None if features is None else features[number * slots : (number + 1) * slots]
        if number == 0:
            index = [0]
            x = _cached(decoder.conv_in, x, own, index)
            x = decoder.mid_block(x, feat_cache=own, feat_idx=index)
        else:
            parts.append(_wan_band(decoder, x, own, begin, end, dim))
        if features is not None and own is not None:
            features[number * slots : (number + 1) * slots] = own
    return torch.cat(parts, dim)


def _wan_band(decoder: Any, x: Tensor, features: list[Any] | None, begin: int, end: int, dim: int) -> Tensor:
    """The frames' rows that latent rows [begin, end) become. `low`: the picture's row that x starts with."""
    stages = [stage for block in decoder.up_blocks for stage in (*block.resnets, *(block.upsamplers or ()))]
    rows, low, index = x.shape[dim], 0, [0]
    for stage, margin in zip([None, *stages], _margins(stages), strict=True):
        if stage is not None:
            x = stage(x, feat_cache=features, feat_idx=index)
        if isinstance(stage, WanResample):
            begin, end, low, rows = 2 * begin, 2 * end, 2 * low, 2 * rows
        first, last = max(0, begin - margin), min(rows, end + margin)
        x, low = x.narrow(dim, first - low, last - first), first
    x = _cached(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), features, index)
    return x.narrow(dim, begin - low, end - begin)


def _margins(stages: list[Any]) -> list[int]:
    """The rows around a band that are needed before each stage, and before the last convolution after them.

    A residual block has two convolutions; an upsampling by two has one behind it.
    """
    margins = [1]
    for stage in reversed(stages):
        margins.insert(0, (margins[0] + 2) // 2 if isinstance(stage, WanResample) else margins[0] + 2)
    return margins


def _cached(convolution: Any, x: Tensor, features: list[Any] | None, index: list[int]) -> Tensor:
    """A causal convolution outside of the reference's blocks: it sees two frames back, and its input is remembered."""
    before = None if features is None else features[index[0]]
    result: Tensor = convolution(x, before)
    if features is not None:
        recent = x[:, :, -2:].clone()
        if recent.shape[2] < 2 and before is not None:
            recent = torch.cat([before[:, :, -1:], recent], dim=2)
        features[index[0]] = recent
        index[0] += 1
    return result


def decode_kl_bands(decoder: Any, x: Tensor, *, dim: int, count: int, cut: Cut | None) -> Tensor:
    """`decoder(x)` of an AutoencoderKL for x (B, C, h, w), in `count` bands of each layer along `dim`."""
    x = decoder.mid_block(decoder.conv_in(x))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet_in_bands(resnet, x, dim, count, cut)
        for upsampler in block.upsamplers or ():
            x = _in_bands(upsampler, x, dim, count, scale=2)
    return _in_bands(_activated(decoder.conv_norm_out, decoder.conv_act, decoder.conv_out, x, cut), x, dim, count)


def _resnet_in_bands(resnet: Any, x: Tensor, dim: int, count: int, cut: Cut | None) -> Tensor:
    """resnet(x). x is overwritten: a row of it is not needed any more once the result has that row."""
    inner = _in_bands(_activated(resnet.norm1, resnet.nonlinearity, resnet.conv1, x, cut), x, dim, count)
    second = _activated(resnet.norm2, resnet.nonlinearity, resnet.conv2, inner, cut)
    channels = inner.shape[1]
    result = x[:, :channels] if channels <= x.shape[1] else torch.empty_like(inner)
    for begin, end, part in _each_band(second, inner, dim, count):
        rows = x.narrow(dim, begin, end - begin)
        rows = resnet.conv_shortcut(rows) if resnet.conv_shortcut is not None else rows
        result.narrow(dim, begin, end - begin).copy_(rows + part)
    return result


def _activated(norm: Any, activation: Any, convolution: Any, x: Tensor, cut: Cut | None) -> Callable[[Tensor], Tensor]:
    """convolution(activation(norm(x))) as a function of any rows of x; the norm's statistics are those of all of x."""
    scale, shift = group_affine(x, norm.num_groups, norm.weight, norm.bias, norm.eps, cut)
    return lambda rows: convolution(activation(torch.addcmul(shift, rows, scale).to(rows.dtype)))


def _in_bands(layer: Callable[[Tensor], Tensor], x: Tensor, dim: int, count: int, *, scale: int = 1) -> Tensor:
    """layer(x), computed as `_each_band`."""
    result: Tensor | None = None
    for begin, end, part in _each_band(layer, x, dim, count, scale=scale):
        if result is None:
            shape = list(part.shape)
            shape[dim] = scale * x.shape[dim]
            result = part.new_empty(shape)
        result.narrow(dim, begin, end - begin).copy_(part)
    assert result is not None, "a picture has rows"
    return result


def _each_band(
    layer: Callable[[Tensor], Tensor], x: Tensor, dim: int, count: int, *, scale: int = 1
) -> Iterator[tuple[int, int, Tensor]]:
    """Rows [begin, end) of layer(x), band by band, for a layer that looks one row beyond each row of x and gives
    `scale` for it."""
    for begin, end in bands(x.shape[dim], count):
        first, last = max(0, begin - 1), min(x.shape[dim], end + 1)
        part = layer(x.narrow(dim, first, last - first))
        yield scale * begin, scale * end, part.narrow(dim, scale * (begin - first), scale * (end - begin))
