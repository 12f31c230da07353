"""How many ranks of a worker group go to which axis: what the flags ask for, and what is chosen when they do not say.

A group has cfg (1 or 2) x ring x ulysses ranks; ring x ulysses ranks (`sp`) share each sequence.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from itertools import combinations

from safelight.runtime.errors import ConfigError

_FLAGS = ("cfg_parallel_degree", "sp_degree", "ring_degree", "ulysses_degree")


@dataclass(frozen=True, slots=True)
class Degrees:
    """One layout of a worker group."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sp(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def world_size(self) -> int:
        return self.cfg * self.sp

    def __str__(self) -> str:
        return f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses}"


@dataclass(frozen=True, slots=True)
class WantedDegrees:
    """The flags of the same names, None where unset. `world_size`: ranks of the group, `num_gpus`: of all replicas."""

    num_gpus: int
    world_size: int
    cfg_parallel_degree: int | None = None
    sp_degree: int | None = None
    ring_degree: int | None = None
    ulysses_degree: int | None = None

    def layouts(self) -> list[Degrees]:
        """Every layout that has the wanted degrees. Raises ConfigError naming the flags that contradict each other."""
        given = [name for name in _FLAGS if getattr(self, name) is not None]
        found = self._with(given)
        if found:
            return found
        subsets = (subset for size in range(1, len(given) + 1) for subset in combinations(given, size))
        culprits = next(list(subset) for subset in subsets if not self._with(list(subset)))
        values = [f"--{name.replace('_', '-')} {getattr(self, name)}" for name in culprits]
        group = f"--num-gpus {self.num_gpus}" + (
            "" if self.num_gpus == self.world_size else f" with --replicas {self.num_gpus // self.world_size}"
        )
        raise ConfigError(
            f"{' and '.join(values)} cannot be had with {group}: a group has cfg (1 or 2) x ring x ulysses = "
            f"{self.world_size} ranks, and sp = ring x ulysses; change one of them or leave it out",
            param=culprits[-1],
        )

    def _with(self, names: list[str]) -> list[Degrees]:
        shares = [(cfg, self.world_size // cfg) for cfg in (1, 2) if self.world_size % cfg == 0]
        layouts = [Degrees(cfg, sp // u, u) for cfg, sp in shares for u in range(1, sp + 1) if sp % u == 0]
        return [degrees for degrees in layouts if all(self._has(degrees, name) for name in names)]

    def _has(self, degrees: Degrees, name: str) -> bool:
        values = (degrees.cfg, degrees.sp, degrees.ring, degrees.ulysses)
        return bool(values[_FLAGS.index(name)] == getattr(self, name))


def choose_degrees(wanted: WantedDegrees, heads: int, guided: bool) -> Degrees:
    """The best layout with the wanted degrees for a model of `heads` attention heads; `guided`: it has two branches.

    Guidance is split first: its halves need nothing of each other until the end of the step. Then Ulysses, as far as
    every rank gets as many heads as the others, because it sends less than a ring; the ring takes what is left.
    Raises ConfigError: contradictory degrees, or more Ulysses ranks than heads (some would idle in every attention).
    """
    found = wanted.layouts()
    possible = [degrees for degrees in found if degrees.ulysses <= heads]
    if not possible:
        raise ConfigError(
            f"--ulysses-degree {min(d.ulysses for d in found)}: this model has {heads} attention heads, and every "
            f"Ulysses rank needs one; use at most {heads}, and --ring-degree for the rest",
            param="ulysses_degree",
        )
    return max(possible, key=lambda d: ((d.cfg == 2) == guided, -idle_share(d, heads), d.ulysses))


def idle_share(degrees: Degrees, heads: int) -> float:
    """How much of its attention time the rank with the fewest heads waits for the one with the most."""
    most = -(-heads // degrees.ulysses)
    return 1 - (heads // degrees.ulysses) / most


def explain(degrees: Degrees, wanted: WantedDegrees, heads: int, guided: bool) -> list[str]:
    """Why each degree is what it is, a line each."""
    given = {name: getattr(wanted, name) is not None for name in _FLAGS}
    cfg = "as asked" if given["cfg_parallel_degree"] else None
    if cfg is None and degrees.cfg == 2:
        cfg = "the guided and the unguided prediction run side by side and meet once a step"
    elif cfg is None:
        cfg = (
            "the ranks or the other flags leave no second half"
            if guided and wanted.world_size > 1
            else "nothing to split"
        )
    ulysses = "as asked" if given["ulysses_degree"] else f"the most that shares {heads} heads and the ranks"
    uneven = idle_share(degrees, heads)
    ring = "as asked" if given["ring_degree"] else "what is left" if degrees.ring > 1 else "no ranks are left"
    return [
        f"cfg {degrees.cfg}: {cfg}",
        f"ulysses {degrees.ulysses}: {ulysses}" + (f"; uneven, up to {uneven:.0%} idle in attention" if uneven else ""),
        f"ring {degrees.ring}: {ring}",
    ]


def check_implementations(sp_impl: str, attention_backend: str, degrees: Degrees, device: str) -> None:
    """Raises ConfigError for an implementation that cannot run here, with the reason."""
    if attention_backend == "fa" and device != "cuda":
        raise ConfigError(
            f"--attention-backend fa runs on CUDA, the model is on {device}; use --attention-backend auto",
            param="attention_backend",
        )
    if sp_impl != "yunchang":
        return
    missing = [package for package in ("flash_attn", "yunchang") if importlib.util.find_spec(package) is None]
    if degrees.sp == 1:
        reason = f"needs --sp-degree 2 or more, and the ranks are {degrees}"
    elif device != "cuda":
        reason = f"runs on CUDA (elsewhere its rings lose the log-sum-exp), and the model is on {device}"
    elif missing:
        reason = f"needs {' and '.join(missing)}, which cannot be imported (pip install 'safelight[flash]')"
    else:
        return
    raise ConfigError(f"--sp-impl yunchang {reason}; use --sp-impl native", param="sp_impl")
