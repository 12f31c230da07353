"""Qwen3 as a text encoder: token ids -> hidden states, with transformers' Qwen3Model, on one rank or shared by several.

The families that read it take the states before the last layer, so that layer and the final norm are not loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from safelight.runtime.errors import ModelError
from safelight.runtime.models.encoders.shared_decoder import narrow
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json, tensor_names
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.parallel.tensor import EncoderGroups

_PREFIX = "model."  # of every tensor in a file that was saved with a language model's head


@dataclass(frozen=True, slots=True)
class Qwen3:
    """A loaded encoder without its last layer. Its dtype is the dtype of its output."""

    module: Qwen3Model
    device: torch.device
    groups: EncoderGroups

    def encode(self, prompts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Token ids of N prompts, without padding, -> N tensors (T_i, E): the states that enter the last layer.

        Each prompt runs by itself: a token sees those before it only, so this equals the reference, which pads on the
        right. Ranks share the work, and each has all results. Raises ModelError for ids outside the vocabulary, on
        every rank before any of them waits for another.
        """
        vocabulary = self.module.config.vocab_size
        if max(map(max, prompts)) >= vocabulary:
            raise ModelError(
                f"token ids up to {max(map(max, prompts))} came, but the text encoder's vocabulary ends at "
                f"{vocabulary - 1}; are tokenizer and text_encoder of the same model?"
            )
        return self.groups.encode(
            [len(ids) for ids in prompts],
            self.module.config.hidden_size,
            lambda numbers: [self._encode(prompts[n]) for n in numbers],
            self.module.embed_tokens.weight,
        )

    def _encode(self, ids: tuple[int, ...]) -> torch.Tensor:
        hidden: torch.Tensor = self.module(torch.tensor([ids], device=self.device), use_cache=False).last_hidden_state
        return hidden[0]


def load_qwen3(folder: Path, device: torch.device, dtype: torch.dtype, mesh: ParallelMesh | None = None) -> Qwen3:
    """The encoder in `folder` (config.json, model.safetensors or its shards), or this rank's share of it. Raises
    ModelError naming file and tensor."""
    path = folder / "config.json"
    values = read_json(path)
    if values.get("model_type") != "qwen3":
        raise ModelError(f"{path}: model_type qwen3 expected, got {values.get('model_type')!r}", param="model_path")
    try:
        config = Qwen3Config.from_dict(values)
        last = int(config.num_hidden_layers) - 1
        config.num_hidden_layers, config.layer_types = last, (config.layer_types or [])[:last]
        with torch.device("meta"):
            module = Qwen3Model(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} does not describe a Qwen3 model: {error}", param="model_path") from error
    setattr(module, "norm", nn.Identity())  # noqa: B010 - typed as the norm that it replaces
    _fill_buffers(module, config)
    groups = EncoderGroups.of(mesh)
    shares = narrow(module, group=groups.tp)
    files = checkpoint_files(folder, "model")
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensor_names(files)) else ""
    names = {name: (prefix + name,) for name, _ in module.named_parameters()}
    unused = (f"{prefix}layers.{last}.", f"{prefix}norm.", "lm_head.")
    parts = {prefix + name: part for name, part in shares.items()}
    load_weights(
        module, files, names, device, lambda _: dtype, ignored=lambda name: name.startswith(unused), parts=parts
    )
    module.train(False)
    return Qwen3(module, device, groups)


def _fill_buffers(module: Qwen3Model, config: Qwen3Config) -> None:
    """The rotary frequencies are computed, not stored: a meta device has none of them."""
    module.rotary_emb = type(module.rotary_emb)(config)
