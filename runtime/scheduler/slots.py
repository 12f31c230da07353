"""Credits for frame slots: a slot is granted to one chunk and comes back exactly once.

A grant ends when output reports the very chunk as read, or, for an attempt that was dropped, when both sides let go:
output (OutputDropped, or a new output process) and the ranks (every one acknowledged the Drop, or the group is gone).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from safelight.runtime.messages import Decode, SlotReleased

Attempt = tuple[str, int]


@dataclass(slots=True)
class _Grant:
    job: str
    attempt: int
    index: int
    take: int
    chunk: int
    orphan: bool = False  # its reader died while a rank may still write: free when the op is acknowledged

    def matches(self, other: SlotReleased | Decode) -> bool:
        ours = (self.job, self.attempt, self.index, self.take, self.chunk)
        return ours == (other.job, other.attempt, other.index, other.take, other.chunk)


@dataclass(slots=True)
class _Closing:
    output: bool = False
    ranks: bool = False


@dataclass(slots=True)
class SlotLedger:
    """Which slot belongs to which chunk."""

    count: int
    free: list[int] = field(init=False)
    _grants: dict[int, _Grant] = field(default_factory=dict)
    _closing: dict[Attempt, _Closing] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.count))

    def grant(self, job: str, attempt: int, index: int, take: int, chunk: int) -> int:
        """A free slot (check `free` first)."""
        slot = self.free.pop()
        self._grants[slot] = _Grant(job, attempt, index, take, chunk)
        return slot

    def released(self, message: SlotReleased) -> bool:
        """Output read the chunk. False when the message does not match the grant exactly."""
        grant = self._grants.get(message.slot)
        if grant is None or not grant.matches(message):
            return False
        self._free(message.slot)
        return True

    def acknowledged(self, op: Decode) -> None:
        """Every rank finished this decode."""
        grant = self._grants.get(op.slot)
        if grant is not None and grant.orphan and grant.matches(op):
            self._free(op.slot)

    def holds(self, job: str, attempt: int) -> bool:
        return any(g.job == job and g.attempt == attempt for g in self._grants.values())

    def close(self, job: str, attempt: int) -> None:
        """The attempt was dropped: wait for both sides."""
        if self.holds(job, attempt):
            self._closing.setdefault((job, attempt), _Closing())

    def output_let_go(self, job: str, attempt: int) -> None:
        if (closing := self._closing.get((job, attempt))) is not None:
            closing.output = True
            self._finish((job, attempt), closing)

    def ranks_let_go(self, job: str, attempt: int) -> None:
        if (closing := self._closing.get((job, attempt))) is not None:
            closing.ranks = True
            self._finish((job, attempt), closing)

    def output_reset(self, in_flight: Collection[int]) -> None:
        """A new reader that knows no chunk: everything comes back, except what a rank may still write to."""
        for attempt, closing in list(self._closing.items()):
            closing.output = True
            self._finish(attempt, closing)
        for slot, grant in list(self._grants.items()):
            if (grant.job, grant.attempt) in self._closing:
                continue
            if slot in in_flight:
                grant.orphan = True
            else:
                self._free(slot)

    def _finish(self, attempt: Attempt, closing: _Closing) -> None:
        if closing.output and closing.ranks:
            del self._closing[attempt]
            for slot in [s for s, g in self._grants.items() if (g.job, g.attempt) == attempt]:
                self._free(slot)

    def _free(self, slot: int) -> None:
        grant = self._grants.pop(slot)
        self.free.append(slot)
        attempt = (grant.job, grant.attempt)
        if attempt in self._closing and not self.holds(*attempt):
            del self._closing[attempt]
