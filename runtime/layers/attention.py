"""Self-attention with rotary positions, over all ranks that share the sequence, cross-attention, joint attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safelight.kernels.dispatch import KernelSet
from safelight.runtime.layers.linear import Adapters, Linear, adapters_of
from safelight.runtime.layers.norm import HeadNorm, RMSNorm
from safelight.runtime.layers.rope import Rotary
from safelight.runtime.parallel.joint import JointShare
from safelight.runtime.parallel.sequence import SequenceGroups


class SelfAttention(nn.Module):
    """x: (B, S/sp, E) -> (B, S/sp, E), attending over all S tokens; q and k are RMS-normed across heads, then rotated.

    `rotary` holds this rank's tokens; `length` is S. Shares follow `SequenceGroups.shard`.
    """

    def __init__(self, width: int, heads: int, eps: float, kernels: KernelSet, *, groups: SequenceGroups) -> None:
        super().__init__()
        self.heads, self.kernels, self.groups = heads, kernels, groups
        self.qkv = Linear(width, 3 * width)
        self.norm_q = RMSNorm(width, eps, kernels)
        self.norm_k = RMSNorm(width, eps, kernels)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary, length: int, adapters: Adapters | None = None) -> Tensor:
        q, k, v = self.qkv(x, adapters_of(adapters, "qkv")).chunk(3, dim=-1)
        q = torch.unflatten(self.norm_q.rotated(q, *rotary), 2, (self.heads, -1))
        k = torch.unflatten(self.norm_k.rotated(k, *rotary), 2, (self.heads, -1))
        v = torch.unflatten(v, 2, (self.heads, -1))
        attended = self.groups.attention(q, k, v, length, self.kernels)
        y: Tensor = self.out(attended.flatten(2), adapters_of(adapters, "out"))
        return y


class CrossAttention(nn.Module):
    """x: (B, S/sp, E), context: (B, T, E) -> (B, S/sp, E). Every rank holds the whole context and all heads."""

    def __init__(self, width: int, heads: int, eps: float, kernels: KernelSet) -> None:
        super().__init__()
        self.heads, self.kernels = heads, kernels
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.norm_q = RMSNorm(width, eps, kernels)
        self.norm_k = RMSNorm(width, eps, kernels)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, adapters: Adapters | None = None) -> Tensor:
        q = torch.unflatten(self.norm_q(self.q(x, adapters_of(adapters, "q"))), 2, (self.heads, -1))
        k, v = self.kv(context, adapters_of(adapters, "kv")).chunk(2, dim=-1)
        k, v = torch.unflatten(self.norm_k(k), 2, (self.heads, -1)), torch.unflatten(v, 2, (self.heads, -1))
        y: Tensor = self.out(self.kernels.attention(q, k, v).flatten(2), adapters_of(adapters, "out"))
        return y


class JointAttention(nn.Module):
    """One attention over text and image tokens that have projections of their own (double-stream blocks).

    text: (B, t, E), image: (B, s, E), this rank's shares by `JointShare` -> the same shapes. Every token attends to all
    T + S tokens of all ranks, exactly, for any T >= 0 and any number of heads. q and k are RMS-normed over each head's
    D, then rotated by `rotary`, which has this rank's text tokens and then its image tokens (`joint_rotary`). The
    same on one rank as diffusers' FluxAttention. All samples have T text tokens: padding would need a mask.
    """

    def __init__(self, width: int, heads: int, eps: float, kernels: KernelSet, *, groups: SequenceGroups) -> None:
        super().__init__()
        self.heads, self.kernels, self.groups = heads, kernels, groups
        self.qkv, self.text_qkv = Linear(width, 3 * width), Linear(width, 3 * width)
        self.norm_q, self.norm_k = (HeadNorm(width // heads, eps, kernels) for _ in range(2))
        self.norm_text_q, self.norm_text_k = (HeadNorm(width // heads, eps, kernels) for _ in range(2))
        self.out, self.text_out = Linear(width, width), Linear(width, width)

    def forward(
        self, text: Tensor, image: Tensor, rotary: Rotary, share: JointShare, adapters: Adapters | None = None
    ) -> tuple[Tensor, Tensor]:
        own = text.shape[1]  # share.own_text, which compiled blocks would take for a constant
        of_text, of_image = Rotary(rotary.cos[:own], rotary.sin[:own]), Rotary(rotary.cos[own:], rotary.sin[own:])
        texts = self.text_qkv(text, adapters_of(adapters, "text_qkv")).chunk(3, dim=-1)
        images = self.qkv(image, adapters_of(adapters, "qkv")).chunk(3, dim=-1)
        q, k, v = self._joint(texts, images, of_text, of_image)
        attended = self.groups.attention(q, k, v, share.length, self.kernels).flatten(2)
        y: Tensor = self.text_out(attended[:, :own], adapters_of(adapters, "text_out"))
        z: Tensor = self.out(attended[:, own:], adapters_of(adapters, "out"))
        return y, z

    def _joint(
        self, texts: tuple[Tensor, ...], images: tuple[Tensor, ...], of_text: Rotary, of_image: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the text (B, t, E) and of the image (B, s, E) -> q, k, v of both, (B, t + s, H, D)."""
        norms = (self.norm_text_q, self.norm_q), (self.norm_text_k, self.norm_k)
        if torch.compiler.is_compiling():  # Inductor lays tensors out anew, and a fused kernel would miss its part
            made = [
                torch.cat((first(t, *of_text), then(i, *of_image)), dim=1)
                for (first, then), t, i in zip(norms, texts, images, strict=False)
            ]
            values = torch.cat((texts[2], images[2]), dim=1)
            return made[0], made[1], torch.unflatten(values, 2, (self.heads, self.norm_q.head_dim))
        own, image = texts[0].shape[1], images[0]
        joint = image.new_empty(3, image.shape[0], own + image.shape[1], image.shape[2])
        for place, (first, then) in enumerate(norms):
            first(texts[place], *of_text, out=joint[place, :, :own])
            then(images[place], *of_image, out=joint[place, :, own:])
        joint[2, :, :own], joint[2, :, own:] = texts[2], images[2]
        q, k, v = torch.unflatten(joint, 3, (self.heads, self.norm_q.head_dim))
        return q, k, v
