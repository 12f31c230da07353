"""A rank executes plans in order, without gaps, of the newest scheduler."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.runtime.errors import ProtocolError
from safelight.runtime.messages import Drop, Plan
from safelight.runtime.worker.gate import PlanGate


def plan(number: int, epoch: int = 0, group: int = 0, group_epoch: int = 0) -> Plan:
    return Plan(scheduler_epoch=epoch, group=group, group_epoch=group_epoch, number=number, ops=(Drop("j", 0),))


def test_plans_in_order_are_admitted_once() -> None:
    gate = PlanGate(0, 0)
    assert [gate.admit(plan(n)) for n in (0, 1, 1, 0, 2)] == [True, True, False, False, True]
    assert (gate.last_received, gate.received_epoch) == (2, 0)
    assert [p.number for p in gate.recent] == [1, 2]


def test_a_gap_ends_the_group() -> None:
    gate = PlanGate(0, 0)
    assert gate.admit(plan(0))
    with pytest.raises(ProtocolError, match="plan 1 of scheduler 0 expected, got 2"):
        gate.admit(plan(2))


def test_a_new_scheduler_starts_at_zero_and_the_old_one_is_refused() -> None:
    gate = PlanGate(0, 0)
    assert gate.admit(plan(0, epoch=3))
    gate.meet_scheduler(4)
    assert not gate.admit(plan(1, epoch=3))
    with pytest.raises(ProtocolError):
        gate.admit(plan(1, epoch=4))
    assert gate.admit(plan(0, epoch=4))


def test_a_plan_for_another_group_or_a_later_epoch_is_refused() -> None:
    gate = PlanGate(1, 2)
    with pytest.raises(ProtocolError):
        gate.admit(plan(0, group=0, group_epoch=2))
    with pytest.raises(ProtocolError):
        gate.admit(plan(0, group=1, group_epoch=3))
    assert not gate.admit(plan(0, group=1, group_epoch=1))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=40))
def test_what_is_admitted_is_gapless_within_a_scheduler_and_never_goes_back(sent: list[tuple[int, int]]) -> None:
    gate = PlanGate(0, 0)
    admitted: list[tuple[int, int]] = []
    for epoch, number in sent:
        try:
            if gate.admit(plan(number, epoch)):
                admitted.append((epoch, number))
        except ProtocolError:
            continue
    assert admitted == sorted(set(admitted))
    for epoch in {e for e, _ in admitted}:
        numbers = [n for e, n in admitted if e == epoch]
        assert numbers == list(range(len(numbers)))
