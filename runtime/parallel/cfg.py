"""Classifier-free guidance over the cfg axis: each half of the ranks predicts one branch, then all have both.

Branch 0 is conditional, branch 1 unconditional. Works on gloo and NCCL.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from safelight.runtime.parallel.mesh import Axis, ParallelMesh


def own_branches(mesh: ParallelMesh, branches: int) -> range:
    """The branches out of `branches` that this rank predicts. All of them when they do not divide by the cfg degree
    (an unguided state on a cfg mesh): every rank then computes the same and nothing is exchanged."""
    degree = mesh.degree(Axis.CFG)
    if branches % degree:
        return range(branches)
    share = branches // degree
    start = mesh.coordinate(Axis.CFG) * share
    return range(start, start + share)


def gather_branches(predictions: Tensor, branches: int, *, group: dist.ProcessGroup | None) -> Tensor:
    """(own, ...) predictions of `own_branches` -> (branches, ...) on every rank. Inverse: indexing with `own_branches`.

    The identity when this rank predicted all branches itself.
    """
    if group is None or predictions.shape[0] == branches:
        return predictions
    predictions = predictions.contiguous()
    gathered = [torch.empty_like(predictions) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, predictions, group=group)
    return torch.cat(gathered)
