"""From a model directory to a loaded pipeline: the worker's only way to a family."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from safelight.configs.families import FAMILIES, ModelSpec, identify
from safelight.runtime.models.residency import DIT, Residency
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.forward_graphs import ForwardGraphs, forward_graphs
from safelight.runtime.pipelines.protocol import Pipeline


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load: where, in which precision, over which ranks."""

    device: torch.device
    dit_dtype: torch.dtype
    vae_dtype: torch.dtype
    vae_path: Path | None
    mesh: ParallelMesh
    vae_tiling: bool = False  # decode in bands
    attention_backend: str = "auto"  # see kernels.dispatch.select_kernels
    input_dir: Path | None = None  # of the pictures that requests name
    backend: str = "auto"
    trust_remote_code: bool = False
    vae_slicing: bool = False
    diffusers_attention_backend: str | None = None
    diffusers_kwargs: Mapping[str, Any] = field(default_factory=dict)
    offload: tuple[str, ...] = ()  # components that live on the CPU; see `residency`
    pin_cpu_memory: bool = True
    cuda_graphs: bool = True  # see `pipelines.forward_graphs`
    residency: Residency = field(init=False, compare=False)  # this and `graphs`: of the one model that is loaded so
    graphs: ForwardGraphs = field(init=False, compare=False)

    def __post_init__(self) -> None:
        made = Residency(self.device, self.offload, pin=self.pin_cpu_memory)
        object.__setattr__(self, "residency", made)  # the dataclass is frozen
        graphs = ForwardGraphs()
        if self._can_record:
            graphs = forward_graphs(self.device, self.mesh.device_bytes, shared=self.mesh.sequence_size > 1)
        object.__setattr__(self, "graphs", graphs)

    @property
    def _can_record(self) -> bool:
        """Streamed blocks are copied by the host, and yunchang's attention is not ours to vouch for."""
        return self.cuda_graphs and DIT not in self.offload and self.mesh.even_attention is None


def load_pipeline(root: Path, options: LoadOptions) -> Pipeline:
    """Loads the model at `root` with the family that its model_index.json and the backend name. Raises ModelError."""
    spec = identify(root, options.backend, options.trust_remote_code)
    module_name, _, attribute = FAMILIES[spec.family].pipeline.partition(":")
    factory = getattr(importlib.import_module(module_name), attribute)
    pipeline: Pipeline = factory(spec, options)
    return pipeline


__all__ = ["LoadOptions", "ModelSpec", "Residency", "load_pipeline"]
