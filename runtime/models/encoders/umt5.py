"""UMT5 as a text encoder: transformers' UMT5EncoderModel behind one call, on one rank or shared by several.

transformers has no tensor-parallel plan for UMT5 or T5. A rank's share is the same module with fewer heads and a
narrower feed-forward layer (T5 gives the head dim apart from the width), whose results are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The module, not the package: `from transformers import ...` resolves through every model's entry.
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from safelight.runtime.errors import ModelError
from safelight.runtime.models.loading import Part, checkpoint_files, load_weights, read_json
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.parallel.tensor import EncoderGroups, SplitEmbedding, share_of, sum_results

PAD = 0


@dataclass(frozen=True, slots=True)
class UMT5:
    """A loaded encoder. Its dtype is the dtype of its output."""

    module: UMT5EncoderModel
    device: torch.device
    vocabulary: int
    groups: EncoderGroups

    def encode(self, prompts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Token ids of N prompts, without padding -> N tensors (T_i, E).

        The batch is padded to its longest prompt and the padding is masked, which gives every prompt what it would get
        alone or padded to 512. Ranks share the work, and each has all results. Raises ModelError for ids outside the
        vocabulary, on every rank before any of them waits for another.
        """
        if max(max(ids, default=PAD) for ids in prompts) >= self.vocabulary:
            raise ModelError(
                f"token ids up to {max(map(max, prompts))} came, but the text encoder's vocabulary ends at "
                f"{self.vocabulary - 1}; are tokenizer and text_encoder of the same model?"
            )
        like = self.module.encoder.final_layer_norm.weight
        return self.groups.encode(
            [len(ids) for ids in prompts],
            self.module.config.d_model,
            lambda numbers: self._encode([prompts[n] for n in numbers]),
            like,
        )

    def _encode(self, prompts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        longest = max(1, *map(len, prompts))
        ids = torch.tensor([[*p, *[PAD] * (longest - len(p))] for p in prompts], device=self.device)
        mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts], device=self.device)
        hidden: torch.Tensor = self.module(ids, mask).last_hidden_state
        return [row[: len(p)] for row, p in zip(hidden, prompts, strict=True)]


def load_umt5(folder: Path, device: torch.device, dtype: torch.dtype, mesh: ParallelMesh | None = None) -> UMT5:
    """The encoder in `folder` (config.json, model.safetensors or its shards), or this rank's share of it.

    float16 overflows in T5's feed-forward layers: float32 is taken in its place. Raises ModelError naming file and
    tensor.
    """
    values = read_json(folder / "config.json")
    if values.get("model_type") != "umt5":
        raise ModelError(f"{folder / 'config.json'}: model_type umt5 expected, got {values.get('model_type')!r}")
    groups = EncoderGroups.of(mesh)
    module: UMT5EncoderModel = load_share(folder, values, groups, device, dtype, (UMT5Config, UMT5EncoderModel))
    return UMT5(module, device, UMT5Config.from_dict(values).vocab_size, groups)


def load_share(
    folder: Path, values: dict[str, Any], groups: EncoderGroups, device: torch.device, dtype: torch.dtype, kind: Any
) -> Any:
    """This rank's share of the T5-like encoder in `folder`, loaded. `kind`: its classes of config and of module;
    `values`: its parsed config.json. Raises ModelError naming file and tensor."""
    module, parts = _share(kind[0].from_dict(values), values, groups, kind)
    names = {name: (name,) for name, _ in module.named_parameters()}
    dtype = torch.float32 if dtype == torch.float16 else dtype
    tied = "encoder.embed_tokens.weight"
    files = checkpoint_files(folder, "model")
    load_weights(module, files, names, device, lambda _: dtype, ignored=lambda name: name == tied, parts=parts)
    module.train(False)
    return module


def _share(whole: Any, values: dict[str, Any], groups: EncoderGroups, kind: Any) -> tuple[Any, dict[str, Part]]:
    """The module of this rank's heads and feed-forward columns, on the meta device, and which part of each stored
    tensor it takes."""
    first_head, heads = share_of(whole.num_heads, group=groups.tp)
    first_column, columns = share_of(whole.d_ff, group=groups.tp)
    if heads == 0:
        raise ModelError(f"the text encoder's {whole.num_heads} heads do not go round {groups.size} ranks (--tp-size)")
    with torch.device("meta"):
        module = kind[1](kind[0].from_dict(values | {"num_heads": heads, "d_ff": columns}))
        rows = SplitEmbedding(whole.vocab_size, whole.d_model, group=groups.tp)
    module.shared = module.shared if groups.tp is None else rows
    module.encoder.embed_tokens = module.shared  # one table under two names
    if groups.tp is None:
        return module, {}
    inner = Part(0, first_head * whole.d_kv, heads * whole.d_kv, whole.num_heads * whole.d_kv)
    wide = Part(0, first_column, columns, whole.d_ff)
    by_layer = {
        "SelfAttention.q": inner, "SelfAttention.k": inner, "SelfAttention.v": inner,
        "SelfAttention.o": inner._replace(dim=1),
        "SelfAttention.relative_attention_bias": Part(1, first_head, heads, whole.num_heads),
        "DenseReluDense.wi_0": wide, "DenseReluDense.wi_1": wide, "DenseReluDense.wo": wide._replace(dim=1),
    }  # fmt: skip
    parts = {"shared.weight": Part(0, rows.start, rows.size, whole.vocab_size)}
    for name, layer in module.encoder.block.named_modules():
        kind = ".".join(name.split(".")[-2:])
        if kind in by_layer:
            parts[f"encoder.block.{name}.weight"] = by_layer[kind]
        if kind in ("SelfAttention.o", "DenseReluDense.wo"):
            sum_results(layer, group=groups.tp)
    return module, parts
