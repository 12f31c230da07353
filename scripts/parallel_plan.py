"""What `bench_parallel.py` and its ranks tell each other, without torch, so that the ranks start at once."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection

from safelight.configs.parallel import Degrees


@dataclass(frozen=True, slots=True)
class Case:
    """`part`: check, step, links, diffusers or vae; the others where they matter. `layout`: cfg x ring x ulysses."""

    part: str
    model: str = ""
    size: str = ""
    layout: str = ""

    @property
    def degrees(self) -> Degrees:
        return Degrees(*map(int, self.layout.split("x")))

    def __str__(self) -> str:
        return " ".join(part for part in (self.part, self.model, self.size, self.layout) if part)


@dataclass(frozen=True, slots=True)
class Settings:
    """`until`: of the wall clock, when everything must have ended; `case_s`: the most that one case may take."""

    device: str
    tiny: bool
    frames: int
    vae_frames: int
    reps: int
    reps_s: float
    case_s: float
    until: float
    transport: str = "auto"  # of Ulysses, see `build_mesh`


def run_rank(
    rank: int, size: int, folder: str, cases: list[tuple[int, Case]], settings: Settings, told: Connection
) -> None:
    """A process of the world; see `parallel_ranks.main`."""
    from parallel_ranks import main

    main(rank, size, folder, cases, settings, told)
