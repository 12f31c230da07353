"""When previews of an unfinished output are made."""

from __future__ import annotations

MAX_PREVIEWS = 20  # of one output: what frontends take


def preview_steps(count: int, steps: int) -> tuple[int, ...]:
    """After which of `steps` steps previews are made, ascending: `count` of them, evenly spaced between the start and
    the finished picture. With fewer steps than that, after each step.

    (3, 20) -> (5, 10, 15); (2, 4) -> (2, 3); (3, 2) -> (1, 2).
    """
    if count >= steps:
        return tuple(range(1, steps + 1))
    return tuple(sorted({-(-number * steps // (count + 1)) for number in range(1, count + 1)}))
