"""Flow-matching samplers: pure mathematics, equal signatures, all state passed in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from safelight.runtime.errors import InvalidRequest
from safelight.runtime.samplers.euler import Euler
from safelight.runtime.samplers.schedule import (
    DynamicShift,
    FlowConfig,
    Sampler,
    Schedule,
    read_config,
    read_image_config,
)
from safelight.runtime.samplers.unipc import UniPC

SAMPLERS: Mapping[str, Callable[[FlowConfig], Sampler]] = MappingProxyType({"unipc": UniPC, "euler": Euler})

__all__ = [
    "SAMPLERS",
    "DynamicShift",
    "Euler",
    "FlowConfig",
    "Sampler",
    "Schedule",
    "UniPC",
    "make_sampler",
    "read_config",
    "read_image_config",
]


def make_sampler(name: str, config: FlowConfig) -> Sampler:
    """The sampler `name` with a model's settings. Raises InvalidRequest for an unknown name."""
    if name not in SAMPLERS:
        raise InvalidRequest(f"sampler {name!r} is unknown; one of {', '.join(SAMPLERS)} is needed", param="sampler")
    if config.unit_table and name != "euler":
        raise InvalidRequest(f"this model's schedule is for euler, sampler {name!r} cannot run it", param="sampler")
    return SAMPLERS[name](config)
