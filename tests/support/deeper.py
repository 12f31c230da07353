"""Tiny checkpoints with more blocks, for tests that need some to come and go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from rank_processes import module
from safetensors.torch import load_file, save_file

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    """A module of scripts/, which is not a package; it may import others of them."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    return module(SCRIPTS / f"{name}.py")


def deeper_wan(folder: Path, layers: int) -> Path:
    """A checkpoint of `layers` blocks, no two alike."""
    return deeper("wan2.1-t2v", folder, "blocks", "num_layers", layers)


def deeper(family: str, folder: Path, blocks: str, count: str, layers: int) -> Path:
    """A family's checkpoint whose list `blocks` has `layers` members, no two alike; `count`: what the config calls that
    number."""
    script("make_checkpoint").make(family, folder)
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(5)
    first = f"{blocks}.0."
    for name in [name for name in tensors if name.startswith(first)]:
        for layer in range(int(config[count]), layers):
            noise = torch.randn(tensors[name].shape, generator=generator)
            tensors[name.replace(first, f"{blocks}.{layer}.")] = tensors[name] * (1 + 0.2 * noise)
    save_file(tensors, file)
    path.write_text(json.dumps(config | {count: layers}))
    return folder
