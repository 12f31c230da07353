"""Which replica gets a job: the one that is predicted to finish it first, at what was measured on each."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_world import World, make_request, profile_of

from safelight.runtime import messages as m
from safelight.runtime.scheduler import placement
from safelight.runtime.scheduler.admission import Queue
from safelight.runtime.scheduler.cost import CostModel
from safelight.runtime.scheduler.jobs import Job
from safelight.runtime.scheduler.policy import by_name

STEP = m.Denoise((m.UnitRef("j", 0, 0, 0),))
SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate_scheduler.py"


@pytest.fixture(scope="module")
def simulator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_scheduler", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def world_of(*speeds: float, policy: str = "fcfs") -> World:
    """Settled groups of one rank, of which steps of so many ms were measured often."""
    world = World(groups=len(speeds), ranks=1, policy_name=policy, checkpoint_every=0)
    for _ in range(3):
        world.tick()
        world.sweep()
    for group, ms in enumerate(speeds):
        for op in (STEP, m.Encode("j", 0, make_request()), m.Decode("j", 0, 0, 0, 0, 0)):
            for _ in range(60):
                world.core.state.cost.learn(op, profile_of(make_request()), ms, group)
    return world


def homes(world: World) -> dict[str, int | None]:
    return {job.id: job.run.group if job.run else None for job in world.core.state.jobs.values()}


def submitted(world: World, count: int, steps: int = 8) -> dict[str, int | None]:
    for number in range(count):
        world.submit(f"j{number}", make_request(steps=steps))
    world.commit()
    return homes(world)


def test_a_job_waits_for_the_fast_replica_when_that_finishes_it_sooner() -> None:
    found = submitted(world_of(1.0, 20.0), 6)
    assert [found[f"j{n}"] for n in range(6)] == [0, 0, None, None, None, None]


def test_the_slow_replica_gets_the_job_that_it_finishes_before_the_queue_of_the_fast_one() -> None:
    found = submitted(world_of(1.0, 4.5), 8)
    assert [found[f"j{n}"] for n in range(8)] == [0, 0, None, None, 1, None, None, None]


def test_equal_replicas_share_evenly() -> None:
    found = submitted(world_of(2.0, 2.0), 4)
    assert sorted(v for v in found.values() if v is not None) == [0, 0, 1, 1]


def test_a_job_goes_only_where_it_fits() -> None:
    world = world_of(1.0, 20.0)
    world.core.state.groups[0].memory.budget = 50
    assert submitted(world, 2) == {"j0": 1, "j1": 1}


def test_a_replicas_new_processes_are_measured_anew() -> None:
    world = world_of(1.0, 20.0)
    world.end_group(1)
    for _ in range(4):
        world.tick()
        world.sweep()
    cost, key = world.core.state.cost, ("denoise", "toy")
    assert cost.rate(key, 1) == cost.rate(key)


def test_one_slow_first_op_does_not_condemn_a_replica() -> None:
    cost, profile, key = CostModel(), profile_of(make_request()), ("denoise", "toy")
    for _ in range(30):
        cost.learn(STEP, profile, 1.0, 0)
    cost.learn(STEP, profile, 10.0, 1)
    assert cost.rate(key, 1) < 3.0
    for _ in range(10):
        cost.learn(STEP, profile, 1.0, 1)
    assert cost.rate(key, 1) < 1.5


def test_a_step_on_a_slow_replica_is_expected_to_take_long() -> None:
    world = world_of(1.0, 20.0)
    world.core.state.groups[0].memory.budget = 50
    submitted(world, 1)
    slow = world.core.state.groups[1]
    world.sweep()
    assert max(o.predicted_ms for o in slow.outstanding) > 10


speeds = st.lists(st.floats(0.5, 50.0), min_size=2, max_size=4)


@settings(deadline=None, max_examples=60)
@given(speeds, st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from(["fcfs", "sjf", "fair"]))
def test_no_job_enters_a_replica_where_another_would_have_finished_it_sooner(
    measured: list[float], jobs: list[int], policy: str
) -> None:
    world = world_of(*measured, policy=policy)
    s = world.core.state
    for number, steps in enumerate(jobs):
        before = {
            g.id: sum(placement.work_ms(s, r.job, g.id) for r in g.residents.values())
            + sum(o.predicted_ms for o in g.outstanding)
            for g in s.groups.values()
        }
        world.submit(f"j{number}", make_request(steps=steps))
        world.commit()
        job = s.jobs[f"j{number}"]
        if job.run is None or len(s.queue):  # it waits, or others did
            continue
        alone = {g: placement.work_ms(s, job, g) for g in before}
        behind_all = min(alone[g] + before[g] for g in before)
        assert alone[job.run.group] <= behind_all * (1 + 1e-6)  # alone there it is not later than behind all elsewhere
    world.quiesce()


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=60), st.integers(1, 20))
def test_the_first_jobs_of_a_queue_are_those_that_would_be_taken_one_by_one(
    pushes: list[tuple[int, bool]], count: int
) -> None:
    queue = Queue(by_name("sjf"))
    jobs: list[Job] = []
    for number, (ms, removed) in enumerate(pushes):
        request = make_request()
        job = Job(
            f"j{number}", "me", number, b"", request, profile_of(request), False, m.Priority.NORMAL, 0.0, None, 0.0
        )
        job.queued_ms = float(ms)
        queue.push(job)
        jobs.append(job)
        if removed:
            queue.remove(random.Random(number).choice(jobs))
    first = [job.id for job in queue.first(0, count)]
    taken: list[str] = []
    while len(taken) < count and (head := queue.head(0)) is not None:
        taken.append(head.id)
        queue.remove(head)
    assert first == taken[: len(first)]
    assert len(first) == len(taken) or len(pushes) > 4 * count


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_under_overload_replicas_serve_in_proportion_to_their_measured_speed(
    simulator: ModuleType, policy: str
) -> None:
    simulation = simulator.Simulation(policy, 300, 3, 2.0, 0.0, seed=5, speeds=(1.0, 0.5, 0.25))
    served = simulation.run().as_dict()["served"]
    assert served[0] == pytest.approx(4 / 7, abs=0.04)
    assert served[1] == pytest.approx(2 / 7, abs=0.04)
    assert served[2] == pytest.approx(1 / 7, abs=0.04)


def test_a_slow_replica_is_hardly_used_while_the_fast_one_has_time(simulator: ModuleType) -> None:
    served = simulator.Simulation("fcfs", 300, 2, 0.2, 0.0, seed=5, speeds=(1.0, 0.1)).run().as_dict()["served"]
    assert served.get(1, 0.0) < 0.05
