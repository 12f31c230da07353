"""Several forwards in one step, for batches whose states cannot share one exactly.

A scheduler batches states whose `BatchKey`s agree; it does not know how many tokens a prompt has, so a family whose
texts differ in length gets mixed lengths in one batch. Padding them to one length is exact only with a mask, which no
fused attention kernel takes at full speed; so each length is a forward of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

S = TypeVar("S")
R = TypeVar("R")


def run_in_groups(
    states: Sequence[S], key: Callable[[S], Hashable], run: Callable[[list[list[S]]], list[list[R]]]
) -> list[R]:
    """`run` on the groups of states that have a key in common, in the order of their first states; one result a state,
    in the states' order. The same on every rank for the same states, so `run` may use collectives."""
    groups: dict[Hashable, list[int]] = {}
    for number, state in enumerate(states):
        groups.setdefault(key(state), []).append(number)
    results: dict[int, R] = {}
    made = run([[states[n] for n in numbers] for numbers in groups.values()])
    for numbers, group in zip(groups.values(), made, strict=True):
        results |= zip(numbers, group, strict=True)
    return [results[n] for n in range(len(states))]
