"""A rank's share of a Qwen language model as transformers builds it: fewer heads, narrower feed-forward layers.

Heads of queries follow the head of keys and values that they share (grouped-query attention, arXiv 2305.13245), so
those are what is given out. As in parallel/tensor.py, two sums over the ranks end each layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from safelight.runtime.errors import ModelError
from safelight.runtime.models.loading import Part
from safelight.runtime.parallel.tensor import SplitEmbedding, share_of, sum_results


def narrow(model: Any, *, group: dist.ProcessGroup | None) -> dict[str, Part]:
    """Leaves of a language model on the meta device (its `embed_tokens` and `layers`) this rank's share, and says which
    part of each of its parameters that is; nothing without a group.

    Raises ModelError: fewer heads of keys and values than ranks, or output projections with biases.
    """
    if group is None:
        return {}
    config = model.config
    kept_heads, heads = share_of(config.num_key_value_heads, group=group)
    if heads == 0:
        raise ModelError(
            f"the text encoder's {config.num_key_value_heads} heads of keys and values do not go round "
            f"{dist.get_world_size(group)} ranks (--tp-size)"
        )
    dim = model.layers[0].self_attn.head_dim
    grouped = config.num_attention_heads // config.num_key_value_heads * dim
    first, columns = share_of(config.intermediate_size, group=group)
    queries = Part(0, kept_heads * grouped, heads * grouped, config.num_key_value_heads * grouped)
    keys = Part(0, kept_heads * dim, heads * dim, config.num_key_value_heads * dim)
    inner = Part(0, first, columns, config.intermediate_size)
    by_layer = {
        "self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys,
        "self_attn.o_proj": queries._replace(dim=1),
        "mlp.gate_proj": inner, "mlp.up_proj": inner, "mlp.down_proj": inner._replace(dim=1),
    }  # fmt: skip
    with torch.device("meta"):
        model.embed_tokens = rows = SplitEmbedding(config.vocab_size, config.hidden_size, group=group)
    parts = {"embed_tokens.weight": Part(0, rows.start, rows.size, config.vocab_size)}
    for number, layer in enumerate(model.layers):
        for name, part in by_layer.items():
            made = _narrowed(layer.get_submodule(name), part)
            layer.set_submodule(name, made)
            parts |= {f"layers.{number}.{name}.{leaf}": part for leaf, _ in made.named_parameters()}
            if part.dim == 1:
                sum_results(made, group=group)
    return parts


def _narrowed(linear: nn.Linear, part: Part) -> nn.Linear:
    """Raises ModelError for one whose result is a sum over ranks, if it has a bias: each would add it."""
    bias = linear.bias is not None
    if part.dim == 1 and bias:
        raise ModelError("the text encoder's output projections have biases: it cannot be shared; leave out --tp-size")
    sizes = (linear.in_features, part.size) if part.dim == 0 else (part.size, linear.out_features)
    return nn.Linear(*sizes, bias=bias, device="meta")
