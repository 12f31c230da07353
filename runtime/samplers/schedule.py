"""What all flow-matching samplers share: their settings, their tables and their one signature.

Convention: x_sigma = (1 - sigma) * x_0 + sigma * noise, and the model predicts the velocity noise - x_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from safelight.runtime.errors import ModelError
from safelight.runtime.pipelines.protocol import SamplerState


@dataclass(frozen=True, slots=True)
class Schedule:
    """`sigmas`: (steps + 1,) float32 on the CPU, from about 1 down to 0; `timesteps`: one model input per step."""

    sigmas: torch.Tensor
    timesteps: tuple[float, ...]


class Sampler(Protocol):
    """A sampler is a frozen value; whatever it remembers between steps is in the SamplerState passed in and out."""

    def schedule(self, steps: int) -> Schedule:
        """The tables for `steps` >= 1 steps."""

    def step(
        self, sigmas: Sequence[float], index: int, sample: torch.Tensor, velocity: torch.Tensor, state: SamplerState
    ) -> tuple[torch.Tensor, SamplerState]:
        """From sigmas[index] to sigmas[index + 1]; `sample` and `velocity` are float32 and are not changed.

        Coefficients are Python floats made from `sigmas`, so a step launches elementwise kernels only and never waits
        for the device.
        """


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """The settings of scheduler_config.json that flow matching reads. `sampler` is the authors' choice."""

    sampler: str
    train_timesteps: int = 1000
    shift: float = 1.0
    solver_order: int = 2


_ANY_CLASS: dict[str, Any] = {
    "use_dynamic_shifting": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "shift_terminal": None,
}
_EULER: dict[str, Any] = _ANY_CLASS | {"invert_sigmas": False, "stochastic_sampling": False}
_UNIPC: dict[str, Any] = _ANY_CLASS | {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "predict_x0": True,
    "solver_type": "bh2",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "thresholding": False,
    "disable_corrector": [],
    "solver_p": None,
}
_UNIPC_CLASS_DEFAULTS = {"use_flow_sigmas": False, "prediction_type": "epsilon"}


def read_config(raw: Mapping[str, Any]) -> FlowConfig:
    """Reads a scheduler_config.json, whose absent settings have the defaults of the diffusers class that it names.

    Raises ModelError naming the first setting that is not supported.
    """
    kind = raw.get("_class_name")
    if kind == "FlowMatchEulerDiscreteScheduler":
        _require(raw, _EULER)
        return FlowConfig("euler", int(_positive(raw, "num_train_timesteps", 1000)), _positive(raw, "shift", 1.0))
    if kind == "UniPCMultistepScheduler":
        _require(_UNIPC_CLASS_DEFAULTS | dict(raw), _UNIPC)
        order = int(_positive(raw, "solver_order", 2))
        if order > 2:
            raise ModelError(f"scheduler_config.json has solver_order = {order}; 1 and 2 are supported")
        train_timesteps = int(_positive(raw, "num_train_timesteps", 1000))
        return FlowConfig("unipc", train_timesteps, _positive(raw, "flow_shift", 1.0), order)
    raise ModelError(
        f"scheduler_config.json has _class_name = {kind!r}; UniPCMultistepScheduler and "
        "FlowMatchEulerDiscreteScheduler are supported"
    )


def _require(raw: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if raw.get(name, value) != value:
            raise ModelError(f"scheduler_config.json has {name} = {raw[name]!r}; only {value!r} is supported")


def _positive(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"scheduler_config.json has {name} = {value!r}; a positive number is needed")
    return float(value)
