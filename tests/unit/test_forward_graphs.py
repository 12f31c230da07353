"""Forwards as graphs: what is recorded, what is launched, and whose tensors come back. The recorder here runs the call
again in place of launching it, on the tensors that were recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import hypothesis
import pytest
import torch
from deeper import script
from hypothesis import strategies as st
from torch import Tensor

from safelight.runtime.errors import JobFailed
from safelight.runtime.models.native import NativePipeline
from safelight.runtime.pipelines import forward_graphs
from safelight.runtime.pipelines.forward_graphs import ForwardGraphs


class Text(NamedTuple):
    embeds: Tensor
    scale: Tensor | None = None
    pictures: tuple[Tensor, ...] = ()


class Repeating:
    """Keeps what was recorded, and on launch computes it again into the same output."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.recorded, self.launched, self.fails, self.pools = 0, 0, fails, 0
        self.rounding = 0

    def pool(self, size: int) -> int:
        self.pools += 1
        return self.pools

    def record(self, call: Callable[[], Tensor], pool: int) -> tuple[Callable[[], None], Tensor]:
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


def run(graphs: ForwardGraphs, forward: Counted, length: int, needs: int, times: int = 2) -> None:
    for seed in range(times):
        given = sample(seed, length)
        torch.testing.assert_close(graphs(forward, *given, needs=lambda: needs), Counted()(*given), rtol=0, atol=0)


def test_a_forward_that_needs_more_than_half_of_the_room_runs_as_it_is() -> None:
    recorder, forward = Repeating(), Counted()
    graphs = ForwardGraphs(recorder, room=1000)
    run(graphs, forward, 5, 501, 3)
    assert (recorder.recorded, forward.calls) == (0, 3)
    run(graphs, forward, 6, 500, 3)
    assert recorder.recorded == 1


def test_forwards_of_one_need_share_a_pool() -> None:
    recorder = Repeating()
    graphs = ForwardGraphs(recorder, room=1000)
    for length in range(1, 9):
        run(graphs, Counted(), length, 500)
    assert (recorder.pools, graphs.count) == (1, 8)


def test_pools_that_are_in_use_are_not_driven_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_graphs, "IDLE_FORWARDS", 10)
    recorder, forward = Repeating(), Counted()
    graphs = ForwardGraphs(recorder, room=1000)
    for length, needs in ((1, 400), (2, 500), (3, 300)):
        run(graphs, forward, length, needs)
    assert (recorder.pools, graphs.count) == (2, 2)  # 300 more do not fit
    for _ in range(20):  # the first is used on, the second is not
        run(graphs, forward, 1, 400, 1)
        run(graphs, forward, 3, 300, 1)
    assert (recorder.pools, graphs.count) == (3, 2)
    before = recorder.recorded
    run(graphs, forward, 1, 400, 1)
    run(graphs, forward, 3, 300, 1)
    assert recorder.recorded == before
    run(graphs, forward, 2, 500, 1)  # its turn is over; it runs as it is
    assert (recorder.recorded, graphs.count) == (before, 2)


@hypothesis.given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([100, 250, 300, 500])), max_size=120))
def test_pools_never_exceed_the_room_and_results_are_right(forwards: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_graphs, "IDLE_FORWARDS", 5)
        patch.setattr(forward_graphs, "MOST_GRAPHS", 3)
        graphs, forward = ForwardGraphs(Repeating(), room=800), Counted()
        for number, (length, needs) in enumerate(forwards):
            given_ = sample(number, 12 * needs + length)
            made = graphs(forward, *given_, needs=lambda needs=needs: needs)  # type: ignore[misc]
            torch.testing.assert_close(made, Counted()(*given_), rtol=0, atol=0)
            assert sum(graphs._pools) <= 800
            assert graphs.count <= 3
            assert {made.size for made in graphs._made.values()} <= set(graphs._pools)


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


def test_a_forward_that_memory_does_not_suffice_to_record_runs_as_it_is_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder, forward = Repeating(torch.OutOfMemoryError("no room")), Counted()
    graphs = ForwardGraphs(recorder)
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            given = sample(seed)
            torch.testing.assert_close(graphs(forward, *given, needs=little), forward(*given), rtol=0, atol=0)
    assert [r.getMessage() for r in caplog.records] == [
        "no CUDA graphs from here on, there is no memory to record a forward: no room"
    ]
    assert (graphs.count, graphs.room) == (0, 0)


def test_what_shares_its_forward_with_other_ranks_does_not_run_alone_as_it_is() -> None:
    graphs, forward = ForwardGraphs(Repeating(torch.OutOfMemoryError("no")), shared=True), Counted()
    graphs(forward, *sample(0), needs=little)
    with pytest.raises(JobFailed, match="--no-cuda-graphs"):
        graphs(forward, *sample(0), needs=little)


def test_needs_are_asked_once_for_a_shape() -> None:
    graphs, forward, asked = ForwardGraphs(Repeating()), Counted(), []
    for seed in range(5):
        graphs(forward, *sample(seed), needs=lambda: len(asked.append(1) or asked))  # type: ignore[func-returns-value]
    assert len(asked) == 1


@pytest.mark.parametrize("error", [torch.AcceleratorError("illegal address"), RuntimeError("not while capturing")])
def test_other_errors_are_not_taken_for_a_lack_of_memory(error: Exception) -> None:
    graphs, forward = ForwardGraphs(Repeating(error)), Counted()
    graphs(forward, *sample(0), needs=little)
    with pytest.raises(type(error)):
        graphs(forward, *sample(0), needs=little)


def test_graphs_that_are_switched_off_need_no_room() -> None:
    recorder, forward = Repeating(), Counted()
    graphs = ForwardGraphs(recorder)
    graphs(forward, *sample(0), needs=little)
    graphs.switch_off()
    for _ in range(3):
        graphs(forward, *sample(0), needs=little)
    assert (recorder.recorded, graphs.count, graphs.room) == (0, 0, 0)


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


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines


CHECKPOINTS = {"wan": "wan2.1-t2v", "flux": "flux1-dev", "qwen": "qwen-image", "zimage": "z-image"}


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_steps_of_every_family_are_recorded_and_give_the_same_bits(family: str, tmp_path: Path) -> None:
    cases = script("parity_table").family(family)
    script("make_checkpoint").make(CHECKPOINTS[family], tmp_path)
    both = cases.Parity(tmp_path)
    recorder = Repeating()
    recording = replace(both.ours, graphs=ForwardGraphs(recorder))
    states = []
    for number, prompt in enumerate(("a red cat", "the blue dog and the green bird, at night")):
        request = both.request(replace(cases.CASES[0], prompt=prompt, steps=4, seed=number))
        states.append(both.ours.prepare(request, both.ours.encode(request), 0))
    with torch.inference_mode():
        for batch in ([states[0]], states, [states[1]], [states[0]]):
            plain = ours = batch
            for _ in range(3):
                plain, ours = both.ours.step(plain), recording.step(ours)
                assert all(torch.equal(a.latents, b.latents) for a, b in zip(plain, ours, strict=True))
    assert recording.graphs.count >= 2
    assert recorder.launched > recorder.recorded


def test_what_a_forward_needs_counts_its_samples_once_and_its_ranks() -> None:
    class Known:
        def __init__(self, ranks: int, dtype: torch.dtype, counted: int) -> None:
            self.mesh, self.transformer = SimpleNamespace(sequence_size=ranks), SimpleNamespace(dtype=dtype)
            self.predictions_counted = lambda state: counted

        def profile(self, request: Any) -> Any:
            return SimpleNamespace(step_peak_bytes=request)

    state: Any = SimpleNamespace(request=800)
    one, both = (cast(Any, Known(1, torch.float32, counted)) for counted in (1, 2))
    assert NativePipeline.forward_bytes(one, [state]) == 800
    assert NativePipeline.forward_bytes(both, [state, state]) == 800  # both branches, which the profile counts
    assert NativePipeline.forward_bytes(both, [state]) == 400  # one of them, on its rank of the cfg axis
    assert NativePipeline.forward_bytes(both, [state] * 4) == 1600  # two jobs
    two: Any = Known(2, torch.bfloat16, 2)
    assert NativePipeline.forward_bytes(two, [state, state]) == 200
