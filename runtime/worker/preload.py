"""Imported by the forkserver before it forks workers: imports only, no tensor op and no CUDA query."""

import torch
import torch.distributed

from safelight.runtime.worker import main

__all__ = ["main", "torch"]
