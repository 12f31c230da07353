"""Forwards of their own for states that cannot share one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.runtime.pipelines.grouping import run_in_groups


@given(st.lists(st.text("ab", max_size=3)))
def test_results_are_in_order_and_a_run_has_one_key(states: list[str]) -> None:
    runs: list[list[str]] = []

    def run(groups: list[list[str]]) -> list[list[str]]:
        runs.extend(groups)
        return [[state.upper() for state in group] for group in groups]

    assert run_in_groups(states, len, run) == [state.upper() for state in states]
    assert all(len({len(state) for state in group}) == 1 for group in runs)
    assert [len(group[0]) for group in runs] == list(dict.fromkeys(map(len, states)))


def test_a_run_that_loses_a_result_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        run_in_groups(["a", "b"], len, lambda groups: [group[:1] for group in groups])
