"""Qwen2.5-VL as a text encoder: transformers' language model behind one call, on one rank or shared by several, with
its vision tower, whole on every rank, where pictures are part of the prompt.

Image tokens have positions of their own along three axes (time, row, column), as in the model's training; text goes on
after the largest of them. diffusers' edit pipelines lose these with transformers 5, which wants to be told which
tokens are images (huggingface/diffusers issue 14194); here they are computed from the ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# The modules, not the package: `from transformers import ...` resolves through every model's entry.
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLTextModel,
    Qwen2_5_VLVisionRotaryEmbedding,
)

from safelight.runtime.errors import ModelError
from safelight.runtime.models.encoders.shared_decoder import narrow
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json, tensor_names
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.parallel.tensor import EncoderGroups

Grid = tuple[int, int]  # rows, columns of a picture's tokens


@dataclass(frozen=True, slots=True)
class SeenPictures:
    """patches: (P, C * time * 14 * 14) of all pictures, as the image processor gives them; grids: tokens of each."""

    patches: torch.Tensor
    grids: tuple[Grid, ...]


@dataclass(frozen=True, slots=True)
class Qwen25VL:
    """A loaded encoder. Its dtype is the dtype of its output."""

    module: nn.ModuleDict  # "text" and, with pictures, "vision"
    device: torch.device
    vocabulary: int
    image_token: int
    merged: int  # patches of a token, along each side
    groups: EncoderGroups

    def encode(
        self, prompts: Sequence[tuple[int, ...]], drop: int, pictures: SeenPictures | None = None
    ) -> list[torch.Tensor]:
        """Token ids of N prompts, without padding, about the same pictures -> N tensors (T_i - drop, E): the last
        layer's output, normed, without the first `drop` tokens.

        Ranks share the work, and each has all results. Raises ModelError, on every rank before any of them waits for
        another: ids outside the vocabulary, or placeholders that are not the pictures'.
        """
        if max(map(max, prompts)) >= self.vocabulary:
            raise ModelError(
                f"token ids up to {max(map(max, prompts))} came, but the text encoder's vocabulary ends at "
                f"{self.vocabulary - 1}; are tokenizer and text_encoder of the same model?"
            )
        seen = None if pictures is None else self._see(pictures)
        grids = () if pictures is None else pictures.grids
        if seen is not None and any(ids.count(self.image_token) != len(seen) for ids in prompts):
            counts = ", ".join(str(ids.count(self.image_token)) for ids in prompts)
            raise ModelError(f"{counts} image tokens came for pictures of {len(seen)}; is processor/ changed?")
        norm: Any = self.module["text"].norm
        return self.groups.encode(
            [len(ids) - drop for ids in prompts],
            len(norm.weight),
            lambda numbers: [self._encode(prompts[n], grids, seen)[drop:] for n in numbers],
            norm.weight,
        )

    def _encode(self, ids: tuple[int, ...], grids: tuple[Grid, ...], seen: torch.Tensor | None) -> torch.Tensor:
        text: Any = self.module["text"]
        embeds = text.embed_tokens(torch.tensor([ids], device=self.device))
        if seen is not None:
            places = [place for place, one in enumerate(ids) if one == self.image_token]
            embeds[0, torch.tensor(places, device=self.device)] = seen.to(embeds.dtype)
        positions = torch.tensor(token_positions(ids, self.image_token, grids), device=self.device)
        hidden: torch.Tensor = text(
            inputs_embeds=embeds, position_ids=positions[:, None], use_cache=False
        ).last_hidden_state
        return hidden[0]

    def _see(self, pictures: SeenPictures) -> torch.Tensor:
        """(tokens of all pictures, E)"""
        vision: Any = self.module["vision"]
        scale = self.merged
        sizes = torch.tensor([[1, rows * scale, columns * scale] for rows, columns in pictures.grids])
        patches = pictures.patches.to(self.device, vision.dtype)
        seen: torch.Tensor = vision(patches, grid_thw=sizes.to(self.device)).pooler_output
        return seen


def token_positions(ids: Sequence[int], image_token: int, grids: Sequence[Grid]) -> list[list[int]]:
    """Three lists of one position per token. A picture's tokens begin where the text before it ends, at the same time,
    and go along rows and columns; the text behind it begins beyond its longer side."""
    axes: list[list[int]] = [[], [], []]
    left, place, following = iter(grids), 0, 0
    while place < len(ids):
        if ids[place] != image_token or not grids:
            for axis in axes:
                axis.append(following)
            place, following = place + 1, following + 1
            continue
        rows, columns = next(left)
        for token in range(rows * columns):
            for axis, offset in zip(axes, (0, token // columns, token % columns), strict=True):
                axis.append(following + offset)
        place, following = place + rows * columns, following + max(rows, columns)
    return axes


def load_qwen2_5_vl(
    folder: Path, device: torch.device, dtype: torch.dtype, mesh: ParallelMesh | None = None, *, vision: bool
) -> Qwen25VL:
    """The encoder in `folder` (config.json, model.safetensors or its shards), or this rank's share of it; its vision
    tower only if asked for.

    Raises ModelError naming file and tensor.
    """
    values = read_json(folder / "config.json")
    if values.get("model_type") != "qwen2_5_vl":
        kind = values.get("model_type")
        raise ModelError(f"{folder / 'config.json'}: model_type qwen2_5_vl expected, got {kind!r}", param="model_path")
    config: Any = Qwen2_5_VLConfig.from_dict(values)
    files = checkpoint_files(folder, "model")
    stored = tensor_names(files)
    module, groups = _on_meta(config, vision=vision), EncoderGroups.of(mesh)
    shares = narrow(module["text"], group=groups.tp)
    parts = {_stored_name(f"text.{name}", stored): part for name, part in shares.items()}
    names = {name: (_stored_name(name, stored),) for name, _ in module.named_parameters()}
    unused = {name for name in stored if name.startswith("lm_head.") or (not vision and "visual." in name)}
    load_weights(module, files, names, device, lambda _: dtype, ignored=lambda name: name in unused, parts=parts)
    module.train(False)
    text, merged = config.text_config, config.vision_config.spatial_merge_size
    return Qwen25VL(module, device, text.vocab_size, config.image_token_id, merged, groups)


def _on_meta(config: Any, *, vision: bool) -> nn.ModuleDict:
    """Parameters on the meta device; the tables of rotary positions, which no file has, on the CPU."""
    with torch.device("meta"):
        module = nn.ModuleDict({"text": Qwen2_5_VLTextModel(config.text_config)})
        if vision:
            module["vision"] = Qwen2_5_VisionTransformerPretrainedModel(config.vision_config)
    module["text"].rotary_emb = Qwen2_5_VLRotaryEmbedding(config.text_config)
    if vision:
        module["vision"].rotary_pos_emb = Qwen2_5_VLVisionRotaryEmbedding(config.vision_config)
    return module


def _stored_name(name: str, stored: frozenset[str]) -> str:
    """Our "text.*" and "vision.*" under the names of the file: those of before transformers 4.52, or later ones."""
    kind, _, rest = name.partition(".")
    older, newer = {"text": ("model", "model.language_model"), "vision": ("visual", "model.visual")}[kind]
    return f"{newer}.{rest}" if f"{newer}.{rest}" in stored else f"{older}.{rest}"
