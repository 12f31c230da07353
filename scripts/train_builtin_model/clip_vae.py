"""Whole-clip passes through diffusers' AutoencoderKLWan, for training.

The published class feeds four frames at a time through 3D convolutions with a cache, which is right for long
videos and slow for many tiny clips. These functions compute the same (a test compares) in one pass: a causal
3D convolution over T frames is one 2D convolution over channels stacked from three neighbouring frames.

Activations are (B, T, H, W, C) throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import nn

NormFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def rms_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """x: (..., C), gamma: (C,). L2 normalisation times sqrt(C), computed in fp32."""
    wide = x.float()
    inverse = wide.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()
    return (wide * inverse * (x.shape[-1] ** 0.5) * gamma).to(x.dtype)


def rms_norm_silu(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """rms_norm, then SiLU; one kernel when compiled."""
    wide = x.float()
    inverse = wide.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()
    return F.silu(wide * inverse * (x.shape[-1] ** 0.5) * gamma).to(x.dtype)


def conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, padding: int) -> torch.Tensor:
    """2D convolution of every frame: (B, T, H, W, C) -> (B, T, H', W', C')."""
    b, t = x.shape[:2]
    flat = x.reshape(b * t, *x.shape[2:]).permute(0, 3, 1, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(flat, weight, bias, stride=stride, padding=padding).permute(0, 2, 3, 1)
    return out.reshape(b, t, *out.shape[1:])


def causal_conv(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """A WanCausalConv3d with kernel (1 or 3, k, k) and temporal stride 1, with zeros before the first frame."""
    weight, padding = conv.weight, conv.weight.shape[-1] // 2
    if weight.shape[2] == 1:
        return conv2d(x, weight[:, :, 0], conv.bias, 1, padding)
    if x.shape[1] == 1:
        return conv2d(x, weight[:, :, 2], conv.bias, 1, padding)
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
    stacked = torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], dim=-1)
    merged = weight.permute(0, 2, 1, 3, 4).flatten(1, 2)
    return conv2d(stacked, merged, conv.bias, 1, padding)


class ClipVae:
    """Encodes and decodes whole clips with the parameters of `vae`. fuse: compile the normalisations (CUDA)."""

    def __init__(self, vae: AutoencoderKLWan, fuse: bool) -> None:
        self.vae = vae
        self.use_fusion(fuse)

    def use_fusion(self, fuse: bool) -> None:
        """Switch compilation of the normalisations on or off."""
        self.fuse = fuse
        if fuse:  # one variant per channel count, with and without gradients
            torch._dynamo.config.recompile_limit = 32
        self.norm_silu: NormFunction = torch.compile(rms_norm_silu, dynamic=False) if fuse else rms_norm_silu

    def encode(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """video: (B, 3, F, H, W) in [-1, 1], F = 4k + 1 -> mean, log variance: (B, C, k + 1, H/8, W/8)."""
        encoder = self.vae.encoder
        x = causal_conv(encoder.conv_in, video.permute(0, 2, 3, 4, 1))
        for layer in encoder.down_blocks:
            x = self._layer(layer, x)
        x = self._middle(encoder.mid_block, x)
        x = causal_conv(encoder.conv_out, self._norm_silu(encoder.norm_out, x))
        moments = causal_conv(self.vae.quant_conv, x).permute(0, 4, 1, 2, 3).float()
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents: (B, C, T, h, w) -> (B, 3, 4T - 3, 8h, 8w), not clamped."""
        decoder = self.vae.decoder
        x = causal_conv(self.vae.post_quant_conv, latents.permute(0, 2, 3, 4, 1))
        x = self._middle(decoder.mid_block, causal_conv(decoder.conv_in, x))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x)
            if block.upsamplers is not None:
                x = self._resample(block.upsamplers[0], x)
        x = causal_conv(decoder.conv_out, self._norm_silu(decoder.norm_out, x))
        return x.permute(0, 4, 1, 2, 3)

    def _norm_silu(self, norm: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self.fuse:
            torch._dynamo.maybe_mark_dynamic(flat, 0)
        return self.norm_silu(flat, norm.gamma.flatten()).view(x.shape)

    def _layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, WanResidualBlock):
            return self._residual(layer, x)
        if isinstance(layer, WanAttentionBlock):
            return self._attention(layer, x)
        assert isinstance(layer, WanResample), type(layer)
        return self._resample(layer, x)

    def _middle(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self._residual(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(resnet, self._attention(attention, x))
        return x

    def _residual(self, block: WanResidualBlock, x: torch.Tensor) -> torch.Tensor:
        skip = x if isinstance(block.conv_shortcut, nn.Identity) else causal_conv(block.conv_shortcut, x)
        x = causal_conv(block.conv1, self._norm_silu(block.norm1, x))
        return causal_conv(block.conv2, self._norm_silu(block.norm2, x)) + skip

    def _attention(self, block: WanAttentionBlock, x: torch.Tensor) -> torch.Tensor:
        b, t, h, w, c = x.shape
        normed = rms_norm(x, block.norm.gamma.flatten())
        qkv = F.linear(normed.reshape(b * t, 1, h * w, c), block.to_qkv.weight[:, :, 0, 0], block.to_qkv.bias)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        out = F.linear(out, block.proj.weight[:, :, 0, 0], block.proj.bias)
        return out.reshape(b, t, h, w, c) + x

    def _resample(self, layer: WanResample, x: torch.Tensor) -> torch.Tensor:
        conv = layer.resample[1] if layer.mode != "none" else None
        if conv is None:
            return x
        if layer.mode.startswith("down"):
            x = conv2d(F.pad(x, (0, 0, 0, 1, 0, 1)), conv.weight, conv.bias, 2, 0)
            if layer.mode == "downsample3d" and x.shape[1] > 1:
                x = torch.cat([x[:, :1], self._halve_time(layer.time_conv, x)], dim=1)
            return x
        if layer.mode == "upsample3d" and x.shape[1] > 1:
            x = torch.cat([x[:, :1], self._double_time(layer.time_conv, x[:, 1:])], dim=1)
        b, t, h, w, c = x.shape
        x = x[:, :, :, None, :, None].expand(b, t, h, 2, w, 2, c).reshape(b, t, 2 * h, 2 * w, c)
        return conv2d(x, conv.weight, conv.bias, 1, 1)

    @staticmethod
    def _halve_time(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
        """(B, 2k + 1, H, W, C) -> (B, k, H, W, C): kernel 3, stride 2, over the first frame as well."""
        stacked = torch.cat([x[:, 0:-2:2], x[:, 1:-1:2], x[:, 2::2]], dim=-1)
        return F.linear(stacked, conv.weight[..., 0, 0].permute(0, 2, 1).flatten(1), conv.bias)

    @staticmethod
    def _double_time(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
        """(B, k, H, W, C) -> (B, 2k, H, W, C): causal kernel 3 that knows nothing of the first frame."""
        padded = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
        stacked = torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], dim=-1)
        out = F.linear(stacked, conv.weight[..., 0, 0].permute(0, 2, 1).flatten(1), conv.bias)
        b, k, h, w, c2 = out.shape
        out = out.view(b, k, h, w, 2, c2 // 2).permute(0, 1, 4, 2, 3, 5)
        return out.reshape(b, 2 * k, h, w, c2 // 2)
