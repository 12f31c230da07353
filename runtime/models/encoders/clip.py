"""CLIP's text model as the encoder of a prompt's gist: transformers' CLIPTextModel behind one call. It is small (123M
parameters): every rank holds it whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

# The modules, not the package: `from transformers import ...` resolves through every model's entry.
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from safelight.runtime.errors import ModelError
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json, tensor_names

_PREFIX = "text_model."  # of the tensors' names in published files


@dataclass(frozen=True, slots=True)
class ClipText:
    """A loaded encoder. Its dtype is the dtype of its output."""

    module: CLIPTextModel
    device: torch.device

    def pooled(self, prompts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Token ids of N prompts, each with its end token last -> N tensors (E,): the state at the first end token.

        Prompts are padded to the encoder's length as in the reference; attention is causal, so the padding is not seen.
        Raises ModelError for ids outside the vocabulary.
        """
        config = self.module.config
        if (most := max(map(max, prompts))) >= config.vocab_size:
            raise ModelError(
                f"token ids up to {most} came, but the vocabulary of text_encoder ends at {config.vocab_size - 1}; are "
                "tokenizer and text_encoder of the same model?"
            )
        length = config.max_position_embeddings
        ids = torch.tensor([[*p, *p[-1:] * (length - len(p))] for p in prompts], device=self.device)
        pooled: torch.Tensor = self.module(ids).pooler_output
        return list(pooled)


def load_clip(folder: Path, device: torch.device, dtype: torch.dtype) -> ClipText:
    """The encoder in `folder` (config.json, model.safetensors). Raises ModelError naming file and tensor."""
    values = read_json(folder / "config.json")
    if values.get("model_type") != "clip_text_model":
        raise ModelError(
            f"{folder / 'config.json'}: model_type clip_text_model expected, got {values.get('model_type')!r}"
        )
    config = CLIPTextConfig.from_dict(values)
    with torch.device("meta"):
        module = CLIPTextModel(config)
    module.embeddings.position_ids = nn.Buffer(  # a buffer on the meta device has no values
        torch.arange(config.max_position_embeddings).expand((1, -1)), persistent=False
    )
    files = checkpoint_files(folder, "model")
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensor_names(files)) else ""
    names = {name: (prefix + name,) for name, _ in module.named_parameters()}
    load_weights(module, files, names, device, lambda _: dtype, ignored=lambda name: name.endswith("position_ids"))
    module.train(False)
    return ClipText(module, device)
