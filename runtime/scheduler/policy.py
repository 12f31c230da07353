"""Who goes next: pure functions over job views.

A policy is one or more lanes. Each lane orders all jobs by its own key and owns a share of the group's time; the lane
that has used least of its share chooses next. `fcfs` and `sjf` have one lane. `fair` gives three quarters of the time
to the job with the least work left, weighted by its priority class (so a short job never waits behind a long one), and
one quarter to the job that has waited longest, where a class counts as a head start in seconds (so classes age, and
the oldest job always advances: nothing starves).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from safelight.runtime.errors import ConfigError
from safelight.runtime.messages import Priority

CLASS_WEIGHT: Mapping[Priority, float] = MappingProxyType(
    {Priority.HIGH: 0.125, Priority.NORMAL: 1.0, Priority.LOW: 8.0}
)
CLASS_DELAY_S: Mapping[Priority, float] = MappingProxyType(
    {Priority.HIGH: -60.0, Priority.NORMAL: 0.0, Priority.LOW: 300.0}
)


@dataclass(frozen=True, slots=True)
class JobView:
    """All that a policy may know of a job."""

    seq: int  # order of acceptance
    accepted_at: float
    priority: Priority
    remaining_ms: float


@dataclass(frozen=True, slots=True)
class Lane:
    share: float
    key: Callable[[JobView], float]  # the smallest goes first


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    lanes: tuple[Lane, ...]

    def turn(self, used_ms: Sequence[float]) -> int:
        """The lane that has used least of its share."""
        if len(self.lanes) == 1:
            return 0
        return min(range(len(self.lanes)), key=lambda i: used_ms[i] / self.lanes[i].share)


def _arrival(view: JobView) -> float:
    return float(view.seq)


def _work_left(view: JobView) -> float:
    return view.remaining_ms


def _weighted_work_left(view: JobView) -> float:
    return view.remaining_ms * CLASS_WEIGHT[view.priority]


def _age(view: JobView) -> float:
    return view.accepted_at + CLASS_DELAY_S[view.priority]


def by_name(name: str) -> Policy:
    """Raises ConfigError for an unknown name."""
    policies = {
        "fcfs": (Lane(1.0, _arrival),),
        "sjf": (Lane(1.0, _work_left),),
        "fair": (Lane(0.75, _weighted_work_left), Lane(0.25, _age)),
    }
    if name not in policies:
        raise ConfigError(f"--policy expected one of {', '.join(policies)}, got {name!r}", param="policy")
    return Policy(name, policies[name])
