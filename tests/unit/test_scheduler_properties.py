"""Random histories of the scheduler's core, with every process dying at every point (the world is in scheduler_world).

Longer: SAFELIGHT_SCHEDULER_HISTORIES=5000 scripts/test tests/unit/test_scheduler_properties.py
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_world import Violation, World, make_request

from safelight.runtime import messages as m
from safelight.runtime.scheduler import lifecycle, planning
from safelight.runtime.scheduler.admission import Memory
from safelight.runtime.scheduler.jobs import Job, Run
from safelight.runtime.scheduler.slots import SlotLedger
from safelight.runtime.scheduler.state import State

HISTORIES = int(os.environ.get("SAFELIGHT_SCHEDULER_HISTORIES", "120"))
PROMPTS = ("", "", "", "", "", "abandoned", "killer:1", "killer:3", "failing:0", "failing:2")


def submit_something(world: World, rng: random.Random) -> None:
    request = make_request(
        rng.randint(1, 6), rng.randint(1, 3), rng.randint(1, 3), rng.choice([1, 1, 1, 2]), rng.choice(PROMPTS),
        len(world.submits) % 3,
    )  # fmt: skip
    world.submit(
        f"job{len(world.submits)}", request, attached=rng.random() < 0.7, priority=rng.choice(list(m.Priority)),
        deadline_s=rng.choice([None, None, None, None, 5.0]),
    )  # fmt: skip


def random_history(seed: int, steps: int = 300) -> World:
    """One world, `steps` random things, then silence; raises Violation."""
    rng = random.Random(seed)
    world = World(
        seed=seed, groups=rng.choice([1, 1, 2, 3]), ranks=rng.choice([1, 2, 3]), slots=rng.choice([1, 2, 4]),
        policy_name=rng.choice(["fair", "fcfs", "sjf"]), checkpoint_every=rng.choice([0, 1, 2]),
    )  # fmt: skip

    def with_a_job(act: Callable[[str], None]) -> None:
        if world.submits:
            act(f"job{rng.randrange(len(world.submits))}")

    rare: list[tuple[float, Callable[[], object]]] = [
        (0.05, lambda: submit_something(world, rng)),
        (0.015, lambda: with_a_job(world.cancel)),
        (0.01, lambda: with_a_job(world.submit_again)),
        (0.006, lambda: world.end_group(rng.randrange(len(world.ranks)))),
        (0.006, world.restart_output),
        (0.006, world.restart_scheduler),
        (0.004, lambda: setattr(rng.choice(world.live_ranks()), "stopped", True)),
        (0.03, lambda: world.tick(rng.choice([0.1, 1.0, 3.0]))),
        (0.15, world.sweep),
    ]
    weights = [p for p, _ in rare]
    for happening in rng.choices([f for _, f in rare] + [world.step], weights=[*weights, 1 - sum(weights)], k=steps):
        happening()
    world.quiesce()
    return world


def run_histories(count: int) -> set[m.Status]:
    """How jobs ended in this many worlds."""
    return {p.status for seed in range(count) for p in random_history(seed).published.values()}


@pytest.mark.timeout(0 if HISTORIES > 500 else 120)
def test_random_histories_lose_nothing_and_break_no_promise() -> None:
    assert run_histories(HISTORIES) == {m.Status.COMPLETED, m.Status.CANCELLED, m.Status.FAILED}


class SchedulerMachine(RuleBasedStateMachine):
    """The same world driven by hypothesis, which shrinks a failing history to its essence."""

    @initialize(
        groups=st.integers(1, 2), ranks=st.integers(1, 2), slots=st.integers(1, 3),
        policy=st.sampled_from(["fair", "fcfs", "sjf"]), every=st.integers(0, 2),
    )  # fmt: skip
    def begin(self, groups: int, ranks: int, slots: int, policy: str, every: int) -> None:
        self.world = World(0, groups, ranks, slots, policy, every)

    @rule(
        steps=st.integers(1, 4), outputs=st.integers(1, 2), chunks=st.integers(1, 3), size=st.integers(1, 2),
        prompt=st.sampled_from(PROMPTS), previews=st.integers(0, 2), attached=st.booleans(),
        priority=st.sampled_from(m.Priority),
    )  # fmt: skip
    def submit(
        self, steps: int, outputs: int, chunks: int, size: int, prompt: str, previews: int, attached: bool,
        priority: m.Priority,
    ) -> None:  # fmt: skip
        request = make_request(steps, outputs, chunks, size, prompt, previews)
        self.world.submit(f"job{len(self.world.submits)}", request, attached=attached, priority=priority)

    @precondition(lambda self: self.world.submits)
    @rule(which=st.integers(0), again=st.booleans())
    def cancel_or_submit_again(self, which: int, again: bool) -> None:
        job = f"job{which % len(self.world.submits)}"
        self.world.submit_again(job) if again else self.world.cancel(job)

    @rule(which=st.integers(0))
    def kill_a_group(self, which: int) -> None:
        self.world.end_group(which % len(self.world.ranks))

    @rule(which=st.integers(0))
    def stop_a_rank(self, which: int) -> None:
        ranks = self.world.live_ranks()
        ranks[which % len(ranks)].stopped = True

    @rule(output=st.booleans())
    def restart(self, output: bool) -> None:
        self.world.restart_output() if output else self.world.restart_scheduler()

    @rule(which=st.integers(0), ops=st.integers(1, 12))
    def one_rank_runs_ahead(self, which: int, ops: int) -> None:
        ranks = self.world.live_ranks()
        rank = ranks[which % len(ranks)]
        for _ in range(ops):
            self.world.run_rank(rank)
        self.world.hear_rank(rank)

    @rule(seconds=st.sampled_from([1.0, 6.0]))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule(count=st.integers(1, 3))
    def sweep(self, count: int) -> None:
        for _ in range(count):
            self.world.sweep()

    @rule()
    def output_works(self) -> None:
        for work in (self.world.output_receives, self.world.output_takes_chunk, self.world.output_reads):
            work()
        self.world.hear_output()

    @rule()
    def little_things(self) -> None:
        self.world.commit(1)
        self.world.hear_supervisor()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.quiesce()


SchedulerMachine.TestCase.settings = settings(
    max_examples=max(100, HISTORIES), stateful_step_count=50, deadline=None,
    suppress_health_check=list(HealthCheck), print_blob=False,
)  # fmt: skip
test_hypothesis_finds_no_bad_history = SchedulerMachine.TestCase


# --------------------------------------------------------------------------------------------------------------------
# The checks can fail: bugs planted in the core must be seen


def plan_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planning, "MAX_OUTSTANDING", 3)


def largest_op_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Memory, "fits", lambda self, held, peak: self.used + held <= self.budget)


def memory_free_at_once(patch: pytest.MonkeyPatch) -> None:
    leave = lifecycle.leave

    def leave_and_free(s: State, run: Run, *, aborted: bool) -> None:
        leave(s, run, aborted=aborted)
        s.groups[run.group].memory.give_back(run.key)

    patch.setattr(lifecycle, "leave", leave_and_free)


def drop_forgotten(patch: pytest.MonkeyPatch) -> None:
    leave = lifecycle.leave

    def leave_without_drop(s: State, run: Run, *, aborted: bool) -> None:
        leave(s, run, aborted=aborted)
        s.groups[run.group].control.clear()

    patch.setattr(lifecycle, "leave", leave_without_drop)


def slot_free_when_output_lets_go(patch: pytest.MonkeyPatch) -> None:
    let_go = SlotLedger.output_let_go

    def too_soon(self: SlotLedger, job: str, attempt: int) -> None:
        let_go(self, job, attempt)
        self.ranks_let_go(job, attempt)

    patch.setattr(SlotLedger, "output_let_go", too_soon)


def slot_granted_twice(patch: pytest.MonkeyPatch) -> None:
    grant = SlotLedger.grant

    def keep_it_free(self: SlotLedger, *chunk: object) -> int:
        slot = grant(self, *chunk)  # type: ignore[arg-type]
        self.free.insert(0, slot)
        return slot

    patch.setattr(SlotLedger, "grant", keep_it_free)


def ranks_get_different_plans(patch: pytest.MonkeyPatch) -> None:
    to_rank = State.to_rank

    def shortened(self: State, group: object, rank: int, message: m.ToWorker) -> None:
        if rank == 1 and isinstance(message, m.Plan) and len(message.ops) > 1:
            message = m.Plan(
                message.scheduler_epoch, message.group, message.group_epoch, message.number, message.ops[:1]
            )
        to_rank(self, group, rank, message)  # type: ignore[arg-type]

    patch.setattr(State, "to_rank", shortened)


def terminal_published_before_commit(patch: pytest.MonkeyPatch) -> None:
    end = lifecycle.end

    def at_once(s: State, job: Job, *args: object) -> None:
        end(s, job, *args)  # type: ignore[arg-type]
        if job.terminal is not None:
            lifecycle.publish(s, job.terminal)

    patch.setattr(lifecycle, "end", at_once)


def job_lost_at_a_death(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lifecycle, "_survive", lambda s, run, suspect: None)


@pytest.mark.parametrize(
    "plant",
    [
        plan_too_early, largest_op_not_counted, memory_free_at_once, drop_forgotten, slot_free_when_output_lets_go,
        slot_granted_twice, ranks_get_different_plans, terminal_published_before_commit, job_lost_at_a_death,
    ],
)  # fmt: skip
def test_planted_bugs_are_seen(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(Violation):
        run_histories(60)


def test_a_replayed_history_gives_the_same_actions() -> None:
    assert random_history(7).plans == random_history(7).plans
