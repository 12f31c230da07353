"""From a model directory to a loaded pipeline: the worker's only way to a family."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import torch

from safelight.configs.families import FAMILIES, ModelSpec, identify
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import Pipeline


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load: where, in which precision, over which ranks."""

    device: torch.device
    dit_dtype: torch.dtype
    vae_dtype: torch.dtype
    vae_path: Path | None
    mesh: ParallelMesh
    compile: bool = False
    vae_tiling: bool = False  # decode in bands
    attention_backend: str = "auto"  # see kernels.dispatch.select_kernels


def load_pipeline(root: Path, options: LoadOptions) -> Pipeline:
    """Loads the model at `root` with the family that its model_index.json names. Raises ModelError."""
    spec = identify(root)
    module_name, _, attribute = FAMILIES[spec.family].pipeline.partition(":")
    factory = getattr(importlib.import_module(module_name), attribute)
    pipeline: Pipeline = factory(spec, options)
    return pipeline


__all__ = ["LoadOptions", "ModelSpec", "load_pipeline"]
