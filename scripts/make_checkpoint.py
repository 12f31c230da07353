#!/usr/bin/env python3
"""Makes a checkpoint with random weights in diffusers format, complete with tokenizer and sampler configuration.

    scripts/make_checkpoint.py wan2.1-t2v DIR [--size tiny|1.3b] [--seed N] [--components transformer,vae,...]

`tiny` takes seconds on a CPU and drives the tests; the published sizes are for measuring speed and are built directly
on the GPU when there is one. Weights are scaled so that activations stay of order one, and no layer is zero, so a
dropped or swapped layer shows. The same seed gives the same weights on the same kind of device.

A further family is one module in `checkpoints/` with a `CHECKPOINTS`: by name and by size, what makes it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parent))  # tests load this file by its path

import checkpoints
import torch
from checkpoints.parts import Checkpoint, build


def families() -> Mapping[str, Mapping[str, Callable[[], Checkpoint]]]:
    """Every checkpoint that can be made, by name and size."""
    found: dict[str, Mapping[str, Callable[[], Checkpoint]]] = {}
    for module in sorted(pkgutil.iter_modules(checkpoints.__path__), key=lambda module: module.name):
        found |= getattr(importlib.import_module(f"checkpoints.{module.name}"), "CHECKPOINTS", {})
    return found


FAMILIES = families()


def make(family: str, folder: Path, size: str = "tiny", seed: int = 0, components: tuple[str, ...] | None = None,
         device: torch.device | None = None) -> None:  # fmt: skip
    """Writes the checkpoint. `components` None means all; model_index.json always names all of them."""
    checkpoint = FAMILIES[family][size]()
    device = device or torch.device("cuda" if torch.cuda.is_available() and size != "tiny" else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, component) in enumerate(checkpoint.components.items()):
        if components is None or name in components:
            made = build(component, checkpoint.dtype, device, seed * 1000 + number)
            made.save_pretrained(folder / name)
            del made
    index: dict[str, Any] = {"_class_name": checkpoint.pipeline, "_diffusers_version": "0.42.1", **checkpoint.extra}
    index |= {name: list(component.kind) for name, component in checkpoint.components.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a checkpoint with random weights in diffusers format.")
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--components", help="comma-separated subset; default: all")
    parser.add_argument("--device", type=torch.device, help="where weights are made (default: the GPU for large sizes)")
    args = parser.parse_args()
    if args.size not in FAMILIES[args.family]:
        parser.error(f"--size: one of {', '.join(FAMILIES[args.family])} expected, got {args.size!r}")
    names = None if args.components is None else tuple(args.components.split(","))
    known = FAMILIES[args.family][args.size]().components
    if names and (unknown := [name for name in names if name not in known]):
        parser.error(f"--components: {', '.join(unknown)} unknown; {args.family} has {', '.join(known)}")
    make(args.family, args.folder, args.size, args.seed, names, args.device)
    print(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
