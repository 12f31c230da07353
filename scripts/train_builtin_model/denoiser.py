"""The text encoder and the transformer as they are trained: short captions, the padding folded into one key."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel

from train_builtin_model.models import TEXT_LENGTH, TEXT_WIDTH

END_ID = 1


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: (B, S, H, D), cos and sin: (1, S, 1, D) with every value twice, as diffusers makes them."""
    x1, x2 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).flatten(-2).type_as(x)


class TrainingAttention:
    """Stands in for WanAttnProcessor. `folded`: how many equal padding tokens the last text key stands for.

    n equal keys with equal values are one key whose score is log(n) higher, so the result is exactly that of
    WanPipeline, which pads captions to 512 tokens.
    """

    def __init__(self, folded: int) -> None:
        self.log_count = math.log(folded)

    def __call__(
        self, attn: nn.Module, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """hidden_states: (B, S, E) -> (B, S, E)."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(source)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(source).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = apply_rotary(query, *rotary_emb), apply_rotary(key, *rotary_emb)
        query, key, value = (t.transpose(1, 2) for t in (query.to(value.dtype), key.to(value.dtype), value))
        if encoder_hidden_states is None:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            scores = (query @ key.mT).float() / query.shape[-1] ** 0.5
            scores = torch.cat([scores[..., :-1], scores[..., -1:] + self.log_count], dim=-1)
            out = scores.softmax(dim=-1).to(value.dtype) @ value
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def rms_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """UMT5LayerNorm, in float32."""
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon))


def text_block(block: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One UMT5 encoder block: hidden (B, L, E), mask (B, L) bool, true where there is a token."""
    attention, feed = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
    length = hidden.shape[1]
    normed = rms_norm(hidden, block.layer[0].layer_norm)
    query, key, value = (
        linear(normed).unflatten(2, (attention.n_heads, -1)).transpose(1, 2)
        for linear in (attention.q, attention.k, attention.v)
    )
    scores = (query @ key.mT).float() + attention.compute_bias(length, length).float()
    weights = scores.masked_fill(~mask[:, None, None], -1e9).softmax(dim=-1).to(value.dtype)
    hidden = hidden + attention.o((weights @ value).transpose(1, 2).flatten(2))
    normed = rms_norm(hidden, block.layer[1].layer_norm)
    return hidden + feed.wo(F.gelu(feed.wi_0(normed), approximate="tanh") * feed.wi_1(normed))


class Denoiser(nn.Module):
    """Text ids and noisy latents in, predicted velocity (noise - data) out.

    `layout_head` reads from the encoded words of a noun phrase where its object is. It is not shipped: it makes the
    text encoder say so. Without it, "a above b" and "b above a" stayed a coin's toss for 25,000 steps, because the
    velocity's error hardly depends on which of two small pictures is where.
    """

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        self.layout_head = nn.Linear(TEXT_WIDTH, 6)

    def use_training_attention(self, caption_tokens: int) -> None:
        """Swap the attention processors; the parameters stay those of the published classes."""
        for block in self.transformer.blocks:
            block.attn1.processor = TrainingAttention(1)
            block.attn2.processor = TrainingAttention(TEXT_LENGTH - caption_tokens)

    def weights(self) -> dict[str, torch.Tensor]:
        """The state without the second name of the tied embedding and without what is only trained with."""
        left_out = ("text_encoder.encoder.embed_tokens.weight", "layout_head.weight", "layout_head.bias")
        return {k: v for k, v in self.state_dict().items() if k not in left_out}

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """The inverse of `weights`; the layout head stays as it is."""
        tied = weights["text_encoder.shared.weight"]
        head = {f"layout_head.{name}": tensor for name, tensor in self.layout_head.state_dict().items()}
        self.load_state_dict({**weights, **head, "text_encoder.encoder.embed_tokens.weight": tied})

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (B, L), zero padded -> (B, L + 1, E): zero past a caption's end; the last row is the padding.

        Computes what UMT5EncoderModel computes (a test compares), in operations that a CUDA graph can record.
        """
        mask = ids != 0
        hidden = self.text_encoder.shared(ids)
        for block in self.text_encoder.encoder.block:
            hidden = text_block(block, hidden, mask)
        hidden = rms_norm(hidden, self.text_encoder.encoder.final_layer_norm)
        return F.pad(hidden * mask[..., None], (0, 0, 0, 1))

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """latents: (B, C, T, h, w), sigma: (B,) in [0, 1], ids: (B, L) -> (B, C, T, h, w), layout (B, L, 6)."""
        text = self.encode_text(ids)
        out = self.transformer(latents, sigma * 1000.0, text, return_dict=False)[0]
        assert isinstance(out, torch.Tensor)
        return out, self.layout_head(text[:, :-1])


def drop_captions(ids: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Replace a share of the captions by the empty one, whose only token is the end mark."""
    empty = torch.zeros_like(ids)
    empty[:, 0] = END_ID
    return torch.where(torch.rand(ids.shape[0], 1, device=ids.device, generator=generator) < share, empty, ids)


def layout_loss(layout: torch.Tensor, ids: torch.Tensor, spans: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the words of all mentions; none of a dropped caption.

    layout: (B, L, 6), ids: (B, L), spans: (B, M, 2), places: (B, M, 6) as in loader.Block.
    """
    position = torch.arange(ids.shape[1], device=ids.device)
    inside = (position >= spans[..., :1]) & (position < spans[..., 1:]) & (ids > END_ID)[:, None]  # (B, M, L)
    error = (layout.float()[:, None] - places[:, :, None]).square().mean(-1)
    return (error * inside).sum() / inside.sum().clamp_min(1)


def draw_sigma(count: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Noise levels: logit-normal, a sixth of them uniform so that both ends are visited."""
    normal = torch.sigmoid(0.4 + 1.1 * torch.randn(count, device=device, generator=generator))
    uniform = torch.rand(count, device=device, generator=generator)
    chosen = torch.rand(count, device=device, generator=generator) < 1 / 6
    return torch.where(chosen, uniform, normal).clamp(1e-3, 1.0)
