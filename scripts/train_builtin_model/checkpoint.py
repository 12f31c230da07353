"""Checkpoints between the parts of a training run: safetensors shards of at most 15 MiB and a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SHARD_BYTES = 15 * 2**20


def save_checkpoint(folder: Path, name: str, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write name-0.safetensors, name-1.safetensors, ... and name.json; each replaced in one move."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for key, tensor in tensors.items():
        if used + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][key] = tensor.detach().cpu().contiguous()
        used += tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(shards):
        temporary = folder / f"{name}-{i}.tmp"
        save_file(shard, temporary)
        temporary.replace(folder / f"{name}-{i}.safetensors")
    for path in folder.glob(f"{name}-*.safetensors"):
        if int(path.stem.rpartition("-")[2]) >= len(shards):
            path.unlink()  # of an earlier checkpoint with more shards
    (folder / f"{name}.json").write_text(json.dumps(meta, indent=1))


def load_checkpoint(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """-> tensors on the CPU, and the JSON file's content."""
    paths = sorted(folder.glob(f"{name}-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no checkpoint {name}-*.safetensors in {folder}")
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        tensors.update(load_file(path))
    return tensors, json.loads((folder / f"{name}.json").read_text())


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys with `prefix.` in front."""
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def with_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries under `prefix.`, without it."""
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}
