"""What a network makes of a step's time alone, made for several steps of a schedule at once and kept until they come.

A matrix that is read for one row costs as much as for sixteen, so its share of a step is a sixteenth.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

ROWS = 16  # steps that are made at once
ROOM_BYTES = 256 << 20  # for all that is kept, or for two blocks of rows where they are larger
_MOST_BLOCKS = 8


class Ahead:
    """Rows of one network, for one thread. `row_bytes`: of what it makes for one time, for which there is room then.

    Nothing here belongs to a job: what is missing is made again, with the same bits, since a schedule is always cut at
    the same steps.
    """

    def __init__(self, row_bytes: int = 0) -> None:
        self._row_bytes = row_bytes
        block = ROWS * row_bytes
        self.room = min(_MOST_BLOCKS * block, max(ROOM_BYTES, 2 * block))  # bytes of the device
        self._blocks: OrderedDict[tuple[Hashable, tuple[float, ...]], Tensor] = OrderedDict()
        self.made = 0  # blocks so far

    def row(
        self, owner: Hashable, times: Sequence[float], step: int, make: Callable[[Sequence[float]], Tensor]
    ) -> Tensor:
        """Row `step` of what `make` gives for a schedule's `times`: (len(times), ...), rows independent of each other.

        `owner`: all else that rows depend on.
        """
        first = step - step % ROWS
        some = tuple(times[first : first + ROWS])
        key = (owner, some)
        if key not in self._blocks:
            self._make_room(len(some))
            self._blocks[key] = make(some)
            self.made += 1
        self._blocks.move_to_end(key)
        return self._blocks[key][step - first]

    def _make_room(self, rows: int) -> None:
        """For a block of so many rows; those used least lately go."""
        kept = sum(len(some) for _, some in self._blocks)
        while self._blocks and (len(self._blocks) >= _MOST_BLOCKS or (kept + rows) * self._row_bytes > self.room):
            (_, gone), _ = self._blocks.popitem(last=False)
            kept -= len(gone)
