"""What the checkpoints of all families are built of: components, tokenizers, and how random weights are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Build = Callable[[], Any]  # gives something with save_pretrained


@dataclass(frozen=True, slots=True)
class Component:
    """`kind` is (library, class) as in model_index.json; `weights` says whether it is a module."""

    kind: tuple[str, str]
    build: Build
    weights: bool = True


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One family at one size."""

    pipeline: str
    components: Mapping[str, Component]
    extra: Mapping[str, Any]  # further entries of model_index.json
    dtype: torch.dtype


def t5_tokenizer() -> Any:
    """A unigram tokenizer over single characters and pieces of words, laid out as T5's (pad 0, end 1, unknown 2)."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(33, 127)] + list("àâäçéèêëîïñóôöùûüßøåæœ¿¡—–…°日本語中文猫犬")
    pieces = ["▁a", "▁the", "▁of", "▁on", "▁in", "▁and", "▁red", "▁blue", "▁cat", "▁dog", "▁with", "ing", "er", "ed", "tion", "ly", "es"]  # fmt: skip  # noqa: E501
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0)]
    vocab += [(letter, -6.0) for letter in letters] + [(piece, -4.0 - 0.1 * len(piece)) for piece in pieces]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


@torch.no_grad()
def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Fills every parameter: matrices and convolutions by their fan-in, norms near one, biases small."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32)
        norm = "norm" in name or name.endswith("gamma")
        if norm and not name.endswith("bias"):
            noise = 1 + 0.1 * noise
        elif "scale_shift_table" in name:
            noise *= 0.2
        elif parameter.ndim >= 2 and not norm:
            noise /= parameter[0].numel() ** 0.5
            if name.endswith("SelfAttention.q.weight"):  # T5 folds the attention scale into q
                noise /= module.config.d_kv**0.5
        else:
            noise *= 0.05
        parameter.copy_(noise)


def build(component: Component, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """One component, filled; modules are made without storage first, so nothing is initialised twice."""
    if not component.weights:
        return component.build()
    with torch.device("meta"):
        made = component.build()
    if dtype != torch.float32:
        made.to(dtype)
    made.to_empty(device=device)
    if hasattr(made, "tie_weights"):
        made.tie_weights()
    randomize(made, torch.Generator(device).manual_seed(seed))
    return made.eval()
