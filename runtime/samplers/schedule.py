"""What all flow-matching samplers share: their settings, their tables and their one signature.

Convention: x_sigma = (1 - sigma) * x_0 + sigma * noise, and the model predicts the velocity noise - x_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
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

    def schedule(self, steps: int, tokens: int | None = None) -> Schedule:
        """The tables for `steps` >= 1 steps. `tokens`: the image's, which a shift that grows with them needs
        (`FlowConfig.dynamic`); others do not look at it."""

    def step(
        self, sigmas: Sequence[float], index: int, sample: torch.Tensor, velocity: torch.Tensor, state: SamplerState
    ) -> tuple[torch.Tensor, SamplerState]:
        """From sigmas[index] to sigmas[index + 1]; `sample` and `velocity` are float32 and are not changed.

        Coefficients are Python floats made from `sigmas`, so a step launches elementwise kernels only and never waits
        for the device.
        """


@dataclass(frozen=True, slots=True)
class DynamicShift:
    """A shift that grows with the image: mu is linear in its tokens, `base_shift` at `base_tokens`, `max_shift` at
    `max_tokens`, and goes on beyond (diffusers' `calculate_shift`). `linear`: the factor is mu, else exp(mu)."""

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    linear: bool = False

    def mu(self, tokens: int) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return tokens * slope + (self.base_shift - slope * self.base_tokens)

    def factor(self, tokens: int) -> float:
        return self.mu(tokens) if self.linear else exp(self.mu(tokens))


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """The settings of scheduler_config.json that flow matching reads. `sampler` is the authors' choice.

    `unit_table`: sigmas start from linspace(1, 1/n, n), which the pipelines of image families pass to their scheduler,
    and not from its training table. `terminal`: the last sigma before 0, to which the shifted table is stretched.
    """

    sampler: str
    train_timesteps: int = 1000
    shift: float = 1.0
    solver_order: int = 2
    unit_table: bool = False
    dynamic: DynamicShift | None = None  # in place of `shift`
    terminal: float | None = None


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


def read_image_config(raw: Mapping[str, Any]) -> FlowConfig:
    """The same for the image families (FLUX, Qwen-Image, Z-Image), whose pipelines pass sigmas of their own (see
    `FlowConfig.unit_table`) and the image's tokens.

    Raises ModelError naming the first setting that is not supported; the class is FlowMatchEulerDiscreteScheduler.
    """
    if (kind := raw.get("_class_name")) != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(f"scheduler_config.json: FlowMatchEulerDiscreteScheduler expected, got _class_name = {kind!r}")
    static = read_config({**raw, "use_dynamic_shifting": False, "shift_terminal": None})
    terminal = raw.get("shift_terminal")
    if terminal is not None and not 0 < _positive(raw, "shift_terminal", 1.0) < 1:
        raise ModelError(f"scheduler_config.json has shift_terminal = {terminal!r}; a number between 0 and 1 is needed")
    dynamic = _dynamic(raw) if raw.get("use_dynamic_shifting", False) else None
    return replace(static, unit_table=True, dynamic=dynamic, terminal=None if terminal is None else float(terminal))


def _dynamic(raw: Mapping[str, Any]) -> DynamicShift:
    kind = raw.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ModelError(f"scheduler_config.json has time_shift_type = {kind!r}; exponential or linear is needed")
    made = DynamicShift(
        _positive(raw, "base_shift", 0.5),
        _positive(raw, "max_shift", 1.15),
        int(_positive(raw, "base_image_seq_len", 256)),
        int(_positive(raw, "max_image_seq_len", 4096)),
        kind == "linear",
    )
    if made.max_tokens <= made.base_tokens:
        raise ModelError(
            f"scheduler_config.json has max_image_seq_len = {made.max_tokens}; more than base_image_seq_len = "
            f"{made.base_tokens} is needed"
        )
    return made


def _require(raw: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if raw.get(name, value) != value:
            raise ModelError(f"scheduler_config.json has {name} = {raw[name]!r}; only {value!r} is supported")


def _positive(raw: Mapping[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"scheduler_config.json has {name} = {value!r}; a positive number is needed")
    return float(value)
