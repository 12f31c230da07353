"""What is made for several steps at once is what would be made for each, and is kept within its room."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from safelight.runtime.layers.modulation import Modulation
from safelight.runtime.pipelines.ahead import ROOM_BYTES, ROWS, Ahead


class Maker:
    """Rows that tell their time and their owner, and what was asked for."""

    def __init__(self, owner: float = 0.0) -> None:
        self.owner = owner
        self.asked: list[tuple[float, ...]] = []

    def __call__(self, times: Sequence[float]) -> Tensor:
        self.asked.append(tuple(times))
        return torch.tensor([[time, self.owner] for time in times], dtype=torch.float64)


def schedule(steps: int) -> tuple[float, ...]:
    return tuple(1000.0 * (steps - i) / steps for i in range(steps))


def test_every_step_gets_its_own_row_and_a_schedule_is_made_in_pieces() -> None:
    for steps in (1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 5):
        ahead, make, times = Ahead(), Maker(), schedule(steps)
        rows = [ahead.row((), times, step, make).tolist() for step in range(steps)]
        assert rows == [[time, 0.0] for time in times]
        assert [time for piece in make.asked for time in piece] == list(times), "each once"
        assert ahead.made == len(make.asked) == -(-steps // ROWS)


def test_a_job_that_goes_on_in_the_middle_asks_for_the_same_pieces() -> None:
    times = schedule(40)
    whole, later = Maker(), Maker()
    for step in range(40):
        Ahead().row((), times, step, whole)
    Ahead().row((), times, 37, later)
    assert later.asked == [whole.asked[37]], "cut at the same steps, so products have the same shapes"


def test_jobs_of_one_schedule_share_rows_and_others_do_not() -> None:
    ahead, first, second = Ahead(), Maker(1.0), Maker(2.0)
    for step in range(10):
        for make in (first, second):
            assert ahead.row(make.owner, schedule(10), step, make)[1] == make.owner
        assert ahead.row(1.0, schedule(10), step, second)[1] == 1.0, "kept"
        assert ahead.row(1.0, schedule(9), min(step, 8), second)[1] == 2.0
    assert (len(first.asked), len(second.asked)) == (1, 2)


def test_what_was_used_least_lately_makes_way() -> None:
    most = 8
    ahead, makers = Ahead(), [Maker(float(i)) for i in range(most + 1)]
    for make in makers[:most]:
        ahead.row(make.owner, schedule(5), 0, make)
    ahead.row(0.0, schedule(5), 3, makers[0])
    ahead.row(makers[most].owner, schedule(5), 0, makers[most])  # in place of the second
    ahead.row(0.0, schedule(5), 4, makers[0])
    ahead.row(1.0, schedule(5), 4, makers[1])
    assert [len(make.asked) for make in makers] == [1, 2, *[1] * (most - 1)]


def test_room_is_that_of_what_is_kept() -> None:
    of_qwen = (60 * 12 + 2) * 3072 * 2
    assert Ahead().room == 0
    assert Ahead(1000).room == 8 * ROWS * 1000
    assert Ahead(of_qwen).room == ROOM_BYTES
    assert Ahead(2 * of_qwen).room == 2 * ROWS * 2 * of_qwen > ROOM_BYTES


@pytest.mark.parametrize("row_bytes", [(60 * 12 + 2) * 3072 * size for size in (2, 4)])
def test_no_more_is_kept_than_there_is_room_for_and_a_row_beside_is_not_lost(row_bytes: int) -> None:
    ahead, make, at_zero = Ahead(row_bytes), Maker(), Maker()
    for step in range(40):
        ahead.row((), schedule(40), step, make)
        ahead.row((), (0.0,), 0, at_zero)
        kept = sum(len(block) for block in ahead._blocks.values())
        assert kept * row_bytes <= ahead.room
    assert (len(make.asked), len(at_zero.asked)) == (3, 1)


def test_a_failed_making_leaves_nothing_behind() -> None:
    ahead, make = Ahead(), Maker()

    def fails(times: Sequence[float]) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for attempt in (fails, make):
        try:
            row = ahead.row((), schedule(3), 1, attempt)
        except torch.OutOfMemoryError:
            continue
        assert row.tolist() == [schedule(3)[1], 0.0]
    assert len(make.asked) == 1


def test_modulation_of_several_times_is_that_of_each_and_is_cut_by_layer() -> None:
    torch.manual_seed(0)
    layer = Modulation(6, (3, 12, 2))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    time = torch.randn(5, 2, 6)
    made = layer(time)
    assert made.shape == (5, 2, 17, 6)
    assert made[0, 0].nbytes == layer.row_bytes(made.dtype)
    parts = layer.split(made.bfloat16())
    assert [part.shape[2] for part in parts] == [3, 12, 2]
    assert all(part.dtype == torch.float32 for part in parts)
    for index, part in enumerate(layer.split(made)):
        matrix = layer.layers[index]
        for b in range(5):
            alone = torch.nn.functional.linear(time[b], matrix.weight, matrix.bias)  # type: ignore[arg-type]
            torch.testing.assert_close(part[b].flatten(1), alone)
