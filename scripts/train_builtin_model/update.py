"""What follows the gradients in every step, without a value that the host must know: it can be captured in a graph.

Gradient clipping, AdamW, Muon and the running average of the weights. Rates and the weight of the average are
tensors on the device, which `schedule` sets between steps.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from train_builtin_model.muon import Muon

ALIGNMENT = 64  # elements: 256 bytes in float32


def flat_views(parameters: list[nn.Parameter]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """-> a vector of zeros, and for each parameter a contiguous part of it in the parameter's shape."""
    offsets = [0]
    for parameter in parameters:
        offsets.append(offsets[-1] + -(-parameter.numel() // ALIGNMENT) * ALIGNMENT)
    flat = torch.zeros(offsets[-1], device=parameters[0].device)
    places = zip(parameters, offsets[:-1], strict=True)
    return flat, [flat[offset : offset + p.numel()].view(p.shape) for p, offset in places]


def flatten_parameters(model: nn.Module) -> torch.Tensor:
    """Move all parameters of `model` into one vector, of which they become views. -> the vector."""
    parameters = list(model.parameters())
    flat, views = flat_views(parameters)
    for parameter, view in zip(parameters, views, strict=True):
        view.copy_(parameter.data)
        parameter.data = view
    return flat


def check_finite(name: str, loss: float) -> None:
    """Raises FloatingPointError: the weights are spoilt, more steps would waste the time that is left."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name}: the loss is {loss}; start this part again")


class Updater:
    """Turns gradients of the trainable parameters of `model` into new weights, and `average` after them.

    matrices belong to Muon, others to AdamW; `average` is a copy of `model`. Both models' parameters are flattened.
    """

    def __init__(
        self, model: nn.Module, average: nn.Module, matrices: list[nn.Parameter], others: list[nn.Parameter],
        adam_rate: float, muon_rate: float,
    ) -> None:  # fmt: skip
        self.flat, self.flat_average = flatten_parameters(model), flatten_parameters(average)
        self.parameters, self.others = [*matrices, *others], others
        # Laid out as the weights are, which a fused AdamW needs.
        self.flat_gradients, self.gradients = flat_views(self.parameters)
        device = self.flat.device
        self.adam_rate, self.muon_rate, self.average_weight = (torch.zeros((), device=device) for _ in range(3))
        self.skipped = torch.zeros((), device=device)  # steps whose gradients were not finite
        self.rates = (adam_rate, muon_rate)
        self.muon = Muon(matrices, self.muon_rate)
        self.adam = torch.optim.AdamW(
            others, lr=self.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True, capturable=device.type == "cuda"
        )

    def schedule(self, factor: float, average_weight: float) -> None:
        """Set the rates to `factor` times the highest; the average moves by `average_weight` towards the weights."""
        self.adam_rate.fill_(self.rates[0] * factor)
        self.muon_rate.fill_(self.rates[1] * factor)
        self.average_weight.fill_(average_weight)

    def step(self, loss: torch.Tensor) -> None:
        """Differentiate and update. Nothing of a step outlives it but the weights, moments and last gradients.

        Where a gradient is not finite (one overflow in bf16 is enough) the step's gradients count as zero.
        """
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        used = [
            (place, gradient) for place, gradient in zip(self.gradients, found, strict=True) if gradient is not None
        ]
        torch._foreach_copy_([place for place, _ in used], [gradient for _, gradient in used])
        finite = self.flat_gradients.sum().isfinite()
        self.flat_gradients.copy_(torch.where(finite, self.flat_gradients, 0.0))
        self.skipped += ~finite
        for parameter, place, gradient in zip(self.parameters, self.gradients, found, strict=True):
            parameter.grad = None if gradient is None else place
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.adam.step()
        self.muon.step()
        self.flat_average.lerp_(self.flat, self.average_weight)
        for parameter in self.parameters:
            parameter.grad = None

    def reset(self) -> None:
        """Forget all moments, in place."""
        self.muon.reset()
        for state in self.adam.state.values():
            for value in state.values():
                value.zero_()
