"""T5 as the text encoder of image families: transformers' T5EncoderModel behind one call, on one rank or shared by
several (as UMT5, whose layers it has)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# The modules, not the package: `from transformers import ...` resolves through every model's entry.
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from safelight.runtime.errors import ModelError
from safelight.runtime.models.encoders.umt5 import PAD, load_share
from safelight.runtime.models.loading import read_json
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.parallel.tensor import EncoderGroups


@dataclass(frozen=True, slots=True)
class T5:
    """A loaded encoder. Its dtype is the dtype of its output."""

    module: T5EncoderModel
    device: torch.device
    vocabulary: int
    groups: EncoderGroups

    def encode(self, prompts: Sequence[tuple[int, ...]], length: int) -> list[torch.Tensor]:
        """Token ids of N prompts of at most `length` -> N tensors (length, E).

        Prompts are padded to `length`, and the padding is attended to, as FLUX was trained. Ranks share the work, and
        each has all results. Raises ModelError for ids outside the vocabulary, on every rank before any of them waits
        for another.
        """
        if (most := max(max(ids, default=PAD) for ids in prompts)) >= self.vocabulary:
            raise ModelError(
                f"token ids up to {most} came, but the vocabulary of text_encoder_2 ends at {self.vocabulary - 1}; are "
                "tokenizer_2 and text_encoder_2 of the same model?"
            )
        return self.groups.encode(
            [length] * len(prompts),
            self.module.config.d_model,
            lambda numbers: self._encode([prompts[n] for n in numbers], length),
            self.module.encoder.final_layer_norm.weight,
        )

    def _encode(self, prompts: Sequence[tuple[int, ...]], length: int) -> list[torch.Tensor]:
        ids = torch.tensor([[*p, *[PAD] * (length - len(p))] for p in prompts], device=self.device)
        hidden: torch.Tensor = self.module(ids).last_hidden_state
        return list(hidden)


def load_t5(folder: Path, device: torch.device, dtype: torch.dtype, mesh: ParallelMesh | None = None) -> T5:
    """The encoder in `folder` (config.json, model.safetensors or its shards), or this rank's share of it.

    float16 overflows in T5's feed-forward layers: float32 is taken in its place. Raises ModelError naming file and
    tensor.
    """
    values = read_json(folder / "config.json")
    if (values.get("model_type"), values.get("feed_forward_proj")) != ("t5", "gated-gelu"):
        raise ModelError(
            f"{folder / 'config.json'}: model_type t5 with feed_forward_proj gated-gelu expected, got "
            f"{values.get('model_type')!r} with {values.get('feed_forward_proj')!r}"
        )
    groups = EncoderGroups.of(mesh)
    module = load_share(folder, values, groups, device, dtype, (T5Config, T5EncoderModel))
    return T5(module, device, T5Config.from_dict(values).vocab_size, groups)
