"""Muon (K. Jordan et al., 2024): momentum whose matrix is replaced by the nearest orthogonal one.

Matrices of equal shape are orthogonalised together in one batched Newton-Schulz iteration.
"""

from __future__ import annotations

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(N, R, C) -> (N, R, C) with singular values near 1, computed in bf16; 3 products and 2 sums an iteration."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT.contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """For matrices and filters inside the network; embeddings, first and last layers and vectors belong to AdamW.

    A filter (O, I, ...) counts as the matrix (O, I * ...). `rate` is a tensor on the device of the parameters, so
    that a captured step follows the schedule.
    """

    def __init__(self, parameters: list[nn.Parameter], rate: torch.Tensor, momentum: float = 0.95) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        self.groups = list(by_shape.values())
        self.buffers = [torch.zeros((len(g), *g[0].flatten(1).shape), device=g[0].device) for g in self.groups]
        self.rate, self.momentum = rate, momentum

    @torch.no_grad()
    def step(self) -> None:
        """One update; the step of an R x C matrix has spectral norm rate * sqrt(max(1, R / C)).

        Parameters of one shape are updated together, or not at all when one of them has no gradient.
        """
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradients = [p.grad.flatten(1) for p in group if p.grad is not None]
            if len(gradients) < len(group):
                continue
            gradient = torch.stack(gradients)
            buffer.lerp_(gradient, 1 - self.momentum)
            rows, columns = buffer.shape[1:]
            update = orthogonalise(gradient.lerp(buffer, self.momentum)).float()
            update = update * (self.rate * -(max(1.0, rows / columns) ** 0.5))
            torch._foreach_add_(group, [u.view_as(p) for u, p in zip(update.unbind(0), group, strict=True)])

    def reset(self) -> None:
        """Forget the momentum."""
        for buffer in self.buffers:
            buffer.zero_()
