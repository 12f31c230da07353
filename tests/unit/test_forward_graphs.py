"""Forwards as graphs: what is recorded, what is launched, and whose tensors come back. The recorder here runs the call
again in place of launching it, on the tensors that were recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from safelight.runtime.pipelines import forward_graphs
from safelight.runtime.pipelines.forward_graphs import ForwardGraphs


class Text(NamedTuple):
    embeds: Tensor
    scale: Tensor | None = None
    pictures: tuple[Tensor, ...] = ()


class Repeating:
    """Keeps what was recorded, and on launch computes it again into the same output."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.recorded, self.launched, self.fails = 0, 0, fails

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.fails is not None:
            raise self.fails
        self.recorded += 1
        output = torch.full_like(call(), torch.nan)  # nothing is done before the launch

        def launch() -> None:
            self.launched += 1
            output.copy_(call())

        return launch, output


class Counted:
    """A forward that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
        self.calls += 1
        total = latents * timestep + text.embeds.sum()
        if text.scale is not None:
            total = total * text.scale
        for picture in text.pictures:
            total = total + picture.mean()
        return total


def little() -> int:
    return 1


def sample(seed: int, length: int = 5, pictures: int = 0) -> tuple[Tensor, Tensor, Text]:
    random = torch.Generator().manual_seed(seed)
    made = torch.randn(2, 3, generator=random), torch.rand(1, generator=random)
    parts = tuple(torch.randn(2, 2, generator=random) for _ in range(pictures))
    return *made, Text(torch.randn(length, generator=random), torch.rand(1, generator=random), parts)


def test_the_second_forward_of_a_shape_is_recorded_and_later_ones_are_launched_with_their_own_inputs() -> None:
    recorder, forward = Repeating(), Counted()
    graphs = ForwardGraphs(recorder)
    for seed in range(5):
        given = sample(seed, pictures=2)
        torch.testing.assert_close(graphs(forward, *given, needs=little), Counted()(*given), rtol=0, atol=0)
    assert (recorder.recorded, recorder.launched, graphs.count) == (1, 4, 1)


def test_a_result_is_the_callers_own() -> None:
    graphs, forward = ForwardGraphs(Repeating()), Counted()
    made = [graphs(forward, *sample(seed), needs=little) for seed in range(4)]
    for seed, result in enumerate(made):
        torch.testing.assert_close(result, forward(*sample(seed)), rtol=0, atol=0)


def test_inputs_are_copied_and_not_kept() -> None:
    graphs, forward = ForwardGraphs(Repeating()), Counted()
    for _ in range(2):
        graphs(forward, *sample(1), needs=little)
    latents, timestep, text = sample(2)
    before = latents.clone()
    expected = forward(latents, timestep, text)
    result = graphs(forward, latents, timestep, text, needs=little)
    torch.testing.assert_close(latents, before, rtol=0, atol=0)
    latents.zero_()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda latents, timestep, text: (latents[:1], timestep, text), id="shape"),
        pytest.param(lambda latents, timestep, text: (latents.double(), timestep, text), id="dtype"),
        pytest.param(lambda latents, timestep, text: (latents, timestep, text._replace(scale=None)), id="absent"),
        pytest.param(lambda *_: sample(9, length=6), id="text length"),
        pytest.param(lambda *_: sample(9, pictures=1), id="pictures"),
    ],
)
def test_inputs_that_differ_in_form_have_graphs_of_their_own(other: Callable[..., tuple[Tensor, Tensor, Text]]) -> None:
    recorder, forward = Repeating(), Counted()
    graphs = ForwardGraphs(recorder)
    for given in [sample(0), sample(1), other(*sample(9)), other(*sample(8)), sample(2), other(*sample(7))]:
        torch.testing.assert_close(graphs(forward, *given, needs=little), forward(*given), rtol=0, atol=0)
    assert (recorder.recorded, graphs.count) == (2, 2)


def test_two_transformers_with_the_same_shapes_are_not_mixed_up() -> None:
    graphs, first = ForwardGraphs(Repeating()), Counted()

    def second(*given: Tensor | Text) -> Tensor:
        return -first(*given)  # type: ignore[arg-type]

    for seed in range(4):
        for forward in (first, second):
            given = sample(seed)
            torch.testing.assert_close(graphs(forward, *given, needs=little), forward(*given), rtol=0, atol=0)
    assert graphs.count == 2


def test_a_forward_that_needs_more_room_runs_as_it_is() -> None:
    recorder = Repeating()
    graphs, forward = ForwardGraphs(recorder, room=1000), Counted()
    for _ in range(3):
        graphs(forward, *sample(0), needs=lambda: 1001)
    assert (recorder.recorded, forward.calls) == (0, 3)
    for _ in range(3):
        graphs(forward, *sample(0), needs=lambda: 1000)
    assert recorder.recorded == 1


def test_only_so_many_are_kept_and_the_least_recently_used_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_graphs, "MOST_GRAPHS", 2)
    recorder, forward = Repeating(), Counted()
    graphs = ForwardGraphs(recorder)
    for length in (1, 2, 1, 3):  # 1 is used again after 2
        for seed in range(2):
            graphs(forward, *sample(seed, length), needs=little)
    assert (recorder.recorded, graphs.count) == (3, 2)
    graphs(forward, *sample(0, 1), needs=little)
    assert recorder.recorded == 3
    graphs(forward, *sample(0, 2), needs=little)  # it was seen, so it is recorded at once
    assert (recorder.recorded, graphs.count) == (4, 2)


def test_shapes_that_were_seen_once_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_graphs, "MOST_SHAPES", 3)
    recorder, forward = Repeating(), Counted()
    graphs = ForwardGraphs(recorder)
    for length in (1, 2, 3, 4, 1):
        graphs(forward, *sample(0, length), needs=little)
    assert recorder.recorded == 0


def test_what_cannot_be_recorded_runs_as_it_is_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder, forward = Repeating(torch.OutOfMemoryError("no room")), Counted()
    graphs = ForwardGraphs(recorder)
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            given = sample(seed)
            torch.testing.assert_close(graphs(forward, *given, needs=little), forward(*given), rtol=0, atol=0)
    assert [r.getMessage() for r in caplog.records] == [
        "no CUDA graphs from here on, a forward cannot be recorded: no room"
    ]
    assert (graphs.count, graphs.room) == (0, 0)


def test_a_device_that_is_lost_is_not_taken_for_a_forward_that_cannot_be_recorded() -> None:
    graphs, forward = ForwardGraphs(Repeating(torch.AcceleratorError("illegal address"))), Counted()
    graphs(forward, *sample(0), needs=little)
    with pytest.raises(torch.AcceleratorError):
        graphs(forward, *sample(0), needs=little)


def test_without_a_recorder_nothing_is_asked_and_nothing_set_aside() -> None:
    graphs, forward = ForwardGraphs(), Counted()
    for _ in range(3):
        graphs(forward, *sample(0), needs=lambda: pytest.fail("asked"))
    assert (forward.calls, graphs.count, graphs.room) == (3, 0, 0)


def test_cleared_graphs_are_recorded_anew() -> None:
    recorder, forward = Repeating(), Counted()
    graphs = ForwardGraphs(recorder)
    for _ in range(2):
        for _ in range(2):
            graphs(forward, *sample(0), needs=little)
        graphs.clear()
        assert graphs.count == 0
    assert recorder.recorded == 2
