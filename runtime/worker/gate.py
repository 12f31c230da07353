"""Which plans a rank may execute: in order, without gaps, of the newest scheduler. Pure."""

from __future__ import annotations

from collections import deque

from safelight.runtime.errors import ProtocolError
from safelight.runtime.messages import Plan


class PlanGate:
    """Admits plans of one rank; keeps the last two, so that a restarted scheduler can be answered."""

    def __init__(self, group: int, group_epoch: int) -> None:
        self._group = group
        self._group_epoch = group_epoch
        self.scheduler_epoch = -1  # the newest scheduler that asked for an inventory or sent a plan
        self.recent: deque[Plan] = deque(maxlen=2)

    @property
    def last_received(self) -> int:
        """Number of the last plan admitted, -1 before the first."""
        return self.recent[-1].number if self.recent else -1

    @property
    def received_epoch(self) -> int:
        """Scheduler epoch of the last plan admitted, -1 before the first."""
        return self.recent[-1].scheduler_epoch if self.recent else -1

    def meet_scheduler(self, epoch: int) -> None:
        """A scheduler introduced itself: plans of older ones are refused from now on."""
        self.scheduler_epoch = max(self.scheduler_epoch, epoch)

    def admit(self, plan: Plan) -> bool:
        """True when the plan is the next one to execute; False for one of an old epoch or received before.

        Raises ProtocolError for a plan of another group, of an epoch yet to come, or after a gap: the ranks of the
        group may no longer agree, so the group must end.
        """
        if plan.group != self._group or plan.group_epoch > self._group_epoch:
            raise ProtocolError(
                f"plan for group {self._group} epoch {self._group_epoch} expected, "
                f"got group {plan.group} epoch {plan.group_epoch}"
            )
        if plan.group_epoch < self._group_epoch or plan.scheduler_epoch < self.scheduler_epoch:
            return False
        expected = self.last_received + 1 if plan.scheduler_epoch == self.received_epoch else 0
        if plan.number < expected:
            return False
        if plan.number > expected:
            raise ProtocolError(f"plan {expected} of scheduler {plan.scheduler_epoch} expected, got {plan.number}")
        self.meet_scheduler(plan.scheduler_epoch)
        self.recent.append(plan)
        return True
