"""UMT5 as a text encoder: transformers' UMT5EncoderModel behind one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# The module, not the package: `from transformers import ...` resolves through every model's entry.
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from safelight.runtime.errors import ModelError
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json

PAD = 0


@dataclass(frozen=True, slots=True)
class UMT5:
    """A loaded encoder. Its dtype is the dtype of its output."""

    module: UMT5EncoderModel
    device: torch.device

    def encode(self, prompts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Token ids of N prompts, without padding -> N tensors (T_i, E).

        The batch is padded to its longest prompt and the padding is masked, which gives every prompt what it would get
        alone or padded to 512. Raises ModelError for ids outside the vocabulary.
        """
        if max(max(ids, default=PAD) for ids in prompts) >= self.module.config.vocab_size:
            raise ModelError(
                f"token ids up to {max(map(max, prompts))} came, but the text encoder's vocabulary ends at "
                f"{self.module.config.vocab_size - 1}; are tokenizer and text_encoder of the same model?"
            )
        longest = max(1, *map(len, prompts))
        ids = torch.tensor([[*p, *[PAD] * (longest - len(p))] for p in prompts], device=self.device)
        mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts], device=self.device)
        hidden: torch.Tensor = self.module(ids, mask).last_hidden_state
        return [row[: len(p)] for row, p in zip(hidden, prompts, strict=True)]


def load_umt5(folder: Path, device: torch.device, dtype: torch.dtype) -> UMT5:
    """The encoder in `folder` (config.json, model.safetensors or its shards). Raises ModelError naming file and tensor.

    float16 overflows in T5's feed-forward layers: float32 is taken in its place.
    """
    values = read_json(folder / "config.json")
    if values.get("model_type") != "umt5":
        raise ModelError(f"{folder / 'config.json'}: model_type umt5 expected, got {values.get('model_type')!r}")
    with torch.device("meta"):
        module = UMT5EncoderModel(UMT5Config.from_dict(values))
    module.encoder.embed_tokens = module.shared  # one table under two names
    names = {name: (name,) for name, _ in module.named_parameters()}
    dtype = torch.float32 if dtype == torch.float16 else dtype
    tied = "encoder.embed_tokens.weight"
    load_weights(
        module, checkpoint_files(folder, "model"), names, device, lambda _: dtype, ignored=lambda name: name == tied
    )
    module.train(False)
    return UMT5(module, device)
