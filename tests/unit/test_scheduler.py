"""The core's rules one by one, in the world of scheduler_world."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import scheduler_world
from msgspec import structs
from scheduler_world import BUDGET, FakeRank, World, make_request, profile_of

from safelight.runtime import messages as m
from safelight.runtime.errors import ConfigError
from safelight.runtime.scheduler import policy
from safelight.runtime.scheduler.admission import Memory, PeakModel, too_large
from safelight.runtime.scheduler.cost import PREPARE_MS, CostModel
from safelight.runtime.scheduler.events import ClientSaid, CoreEvent, OutputSaid, RankSaid, SendClient, SupervisorSaid
from safelight.runtime.scheduler.jobs import Cursor, Stage
from safelight.runtime.scheduler.policy import JobView
from safelight.runtime.scheduler.records import CheckpointRecord


def settled(**options: Any) -> World:
    """A world whose groups and output are ready."""
    world = World(**options)
    for _ in range(3):
        world.tick()
        world.sweep()
    return world


def ask(world: World, message: m.ToScheduler) -> Any:
    """The answer to a client's message, which has to come at once."""
    actions = world.core.handle(ClientSaid(b"asker", message), world.now)
    answers = [a.message for a in actions if isinstance(a, SendClient)]
    assert len(answers) == 1
    return answers[0]


def tell(world: World, event: CoreEvent) -> list[Any]:
    return [getattr(a, "message", a) for a in world.core.handle(event, world.now)]


def ops_of(world: World, job: str) -> list[m.Op]:
    found = []
    for _, plan in sorted(world.plans.items()):
        for op in plan.ops:
            name = op.units[0].job if isinstance(op, m.Denoise) else op.job
            found += [op] if name == job else []
    return found


def test_one_job_walks_the_line() -> None:
    world = settled(checkpoint_every=2)
    world.submit("a", make_request(steps=3, outputs=2, chunks=2))
    world.quiesce()
    kinds = [type(op).__name__ for op in ops_of(world, "a")]
    one = ["Prepare", "Denoise", "Denoise", "Checkpoint", "Denoise", "Decode", "Decode"]
    assert kinds == ["Encode", *one, "Release", *one, "Drop"]
    assert world.published["a"].status == m.Status.COMPLETED
    assert world.files == set()


def test_those_who_wait_are_told_that_they_moved_up_and_how_long_it_takes() -> None:
    world = settled(policy_name="fcfs")
    told: dict[str, list[tuple[int, float]]] = {}
    receive = world.output.receive

    def note() -> m.ToOutput:
        message = receive()
        if isinstance(message, m.Progress) and message.stage == m.Stage.QUEUED:
            told.setdefault(message.job, []).append((message.position, message.eta_ms or 0.0))
        return message

    world.output.receive = note  # type: ignore[method-assign]
    for number in range(6):
        world.submit(f"job{number}", make_request(steps=6))
    world.commit()
    first = ask(world, m.QueryJob("job1", "me")), ask(world, m.QueryJob("job5", "me"))
    assert first[0].eta_ms < first[1].eta_ms, "who comes earlier is done earlier"
    world.quiesce()
    positions = [position for position, _ in told["job5"]]
    assert positions[0] == 5
    assert positions == sorted(set(positions), reverse=True)
    assert len(positions) > 2
    times = [eta for _, eta in told["job5"]]
    assert times == sorted(times, reverse=True)


def test_previews_follow_their_steps_and_every_output_has_them() -> None:
    world = settled()
    world.submit("a", make_request(steps=6, outputs=2, previews=2))
    world.submit("none", make_request(steps=6))
    world.quiesce()
    ops = ops_of(world, "a")
    for output in range(2):
        made = [op for op in ops if isinstance(op, m.Preview) and op.index == output]
        assert made == [m.Preview("a", 0, output, 0, 2), m.Preview("a", 0, output, 1, 4)]
        for preview in made:
            before = [op for op in ops[: ops.index(preview)] if isinstance(op, m.Denoise)][-1].units[0]
            assert (before.index, before.step + 1) == (output, preview.step)
    assert world.previews == [op for op in ops if isinstance(op, m.Preview)]
    assert not any(isinstance(op, m.Preview) for op in ops_of(world, "none"))
    assert world.published["a"].status == m.Status.COMPLETED


def test_a_preview_takes_no_slot_and_none_is_made_when_nobody_would_send_it_on() -> None:
    world = settled(slots=1)
    free = list(world.core.state.slots.free)
    world.submit("a", make_request(steps=6, previews=5))
    while not world.previews:
        assert list(world.core.state.slots.free) == free
        world.step()
    world.core.state.output.ready = False
    seen = len(ops_of(world, "a"))
    for _ in range(30):
        for rank in world.live_ranks():
            world.run_rank(rank)
            world.hear_rank(rank)
    later = ops_of(world, "a")[seen:]
    assert any(isinstance(op, m.Denoise) for op in later)
    assert not any(isinstance(op, m.Preview) for op in later)


def test_an_error_with_a_preview_is_nobodys_error() -> None:
    world = settled(ranks=1)
    execute = world._execute

    def fail(rank: scheduler_world.FakeRank, op: m.Op) -> m.OpResult:
        wrong = m.OpResult(error=m.ErrorInfo("job_failed", "no colours"))
        return wrong if isinstance(op, m.Preview) else execute(rank, op)

    world._execute = fail  # type: ignore[method-assign]
    world.submit("a", make_request(previews=3))
    world.quiesce()
    assert world.published["a"].status == m.Status.COMPLETED


def test_the_same_submit_returns_the_existing_job_and_another_body_conflicts() -> None:
    world = settled()
    world.submit("a", make_request())
    world.sweep()
    again = ask(world, world.submits["a"])
    assert again == m.Accepted("a", existing=True)
    other = ask(world, m.Submit("a", "me", make_request(steps=9)))
    assert (other.error.code, other.error.param) == ("conflict", "job")
    stranger = ask(world, m.Submit("a", "someone else", world.submits["a"].request))
    assert stranger.error.code == "conflict"
    world.quiesce()
    assert ask(world, world.submits["a"]) == m.Accepted("a", existing=True)


def test_nothing_is_answered_before_the_journal_has_it() -> None:
    world = settled()
    said = tell(world, ClientSaid(b"c", m.Submit("a", "me", make_request())))
    assert not any(isinstance(s, m.Accepted | m.OpenJob) for s in said)


@pytest.mark.parametrize("message", [m.Cancel("a", "other"), m.Cancel("b", "me"), m.QueryJob("a", "other")])
def test_jobs_of_others_are_not_found(message: m.ToScheduler) -> None:
    world = settled()
    world.submit("a", make_request())
    world.sweep()
    assert ask(world, message).error.code == "not_found"


def test_a_request_that_the_family_refuses_is_refused_with_its_parameter() -> None:
    refused = ask(settled(), m.Submit("a", "me", make_request(steps=0)))
    assert (refused.error.code, refused.error.param) == ("invalid_request", "num_inference_steps")


@pytest.mark.parametrize("job", ["", "../../etc/passwd", "a" * 65, "a b"])
def test_job_ids_that_could_become_other_paths_are_refused(job: str) -> None:
    refused = ask(settled(), m.Submit(job, "me", make_request()))
    assert (refused.error.code, refused.error.param) == ("invalid_request", "job")


def test_what_can_never_fit_is_refused_with_the_figures() -> None:
    refused = ask(settled(), m.Submit("a", "me", make_request(size=4)))
    assert refused.error.code == "too_large"
    assert f"{BUDGET / 1e9:.3f} GB" in refused.error.message


def test_what_does_not_fit_is_failed_when_memory_becomes_known_after_the_submit() -> None:
    world = World()
    world.submit("a", make_request(size=4))
    world.quiesce()
    error = world.published["a"].error
    assert error is not None
    assert error.code == "too_large"


def test_weights_that_come_for_encoding_count_while_it_encodes() -> None:
    """A profile of 15 bytes to encode, 30 to step and 40 to decode."""
    profile = profile_of(make_request(size=1))
    peaks = PeakModel()
    assert [peaks.peak(profile, moved) for moved in (0, 20, 25, 100)] == [40, 40, 40, 115]
    group = Memory(budget=profile.held_bytes + 114, encode_bytes=100)
    assert too_large(profile, peaks, [group]) is not None
    assert too_large(profile, peaks, [group, Memory(group.budget)]) is None
    world = World()
    ready = FakeRank.ready
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeRank, "ready", lambda self: structs.replace(ready(self), encode_bytes=BUDGET))
        world.quiesce()
        refused = ask(world, m.Submit("a", "me", make_request()))
    assert refused.error.code == "too_large"
    assert f"{(BUDGET + 15) / 1e9:.3f} GB for its largest step" in refused.error.message


def test_a_chunk_larger_than_a_slot_is_refused() -> None:
    refused = ask(settled(), m.Submit("a", "me", make_request(size=101)))
    assert refused.error.code == "too_large"
    assert "slot" in refused.error.message


def test_a_full_queue_refuses_with_an_estimate() -> None:
    world = settled(max_queue=3)
    for n in range(3):
        world.submit(f"j{n}", make_request())
    refused = ask(world, m.Submit("late", "me", make_request()))
    assert refused.error.code == "overloaded"
    assert 1.0 <= refused.error.retry_after_s <= 110.0
    world.quiesce()


def test_a_lease_that_is_not_renewed_cancels_the_job() -> None:
    world = World()  # no worker is ready, so the job waits
    world.submit("gone", make_request(prompt="abandoned"))
    world.submit("here", make_request())
    world.submit("detached", make_request(prompt="abandoned"), attached=False)
    world.commit()
    for _ in range(11):
        world.tick()
    world.quiesce()
    assert {j: p.status for j, p in world.published.items()} == {
        "gone": m.Status.CANCELLED, "here": m.Status.COMPLETED, "detached": m.Status.COMPLETED,
    }  # fmt: skip


def test_a_deadline_cancels() -> None:
    world = World()
    world.submit("a", make_request(), deadline_s=3.0)
    world.commit()
    world.now += 4
    world.tick(0)
    world.quiesce()
    assert world.published["a"].status == m.Status.CANCELLED


@pytest.mark.parametrize("deadline_s", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_deadline_that_is_none_is_refused(deadline_s: float) -> None:
    refused = ask(settled(), m.Submit("a", "me", make_request(), deadline_s=deadline_s))
    assert (refused.error.code, refused.error.param) == ("invalid_request", "deadline_s")


def test_cancel_drops_the_job_in_the_next_plan_and_keeps_its_memory_until_then() -> None:
    world = settled()
    world.submit("a", make_request(steps=6))
    world.commit()
    world.commit()
    group = world.core.state.groups[0]
    assert group.memory.used > 0
    world.cancel("a")
    world.commit()
    assert world.expected["a", "cancel"] == 0
    assert group.memory.used > 0
    world.quiesce()
    assert isinstance(ops_of(world, "a")[-1], m.Drop)
    assert group.memory.used == 0


def test_an_op_error_fails_its_job_alone() -> None:
    world = settled()
    world.submit("bad", make_request(prompt="failing:1"))
    world.submit("good", make_request())
    world.quiesce()
    assert world.published["bad"].error == m.ErrorInfo("job_failed", "as asked for")
    assert world.published["good"].status == m.Status.COMPLETED
    assert world.deaths == 0


def test_a_killer_is_poisoned_and_its_neighbours_complete() -> None:
    world = settled(checkpoint_every=2)
    for n in range(3):
        world.submit(f"good{n}", make_request(steps=5, outputs=2))
    world.submit("bad", make_request(prompt="killer:2"))
    world.quiesce()
    error = world.published["bad"].error
    assert error is not None
    assert error.code == "poisoned"
    assert world.deaths == 3
    assert all(world.published[f"good{n}"].status == m.Status.COMPLETED for n in range(3))


def test_a_job_resumes_from_its_last_journalled_checkpoint() -> None:
    world = settled(checkpoint_every=2, ranks=1)
    world.submit("a", make_request(steps=6))
    while not any(isinstance(r, CheckpointRecord) and r.ref.step == 4 for r in world.records):
        world.sweep()
    world.end_group(0)
    world.quiesce()
    prepared = [op for op in ops_of(world, "a") if isinstance(op, m.Prepare)]
    assert [(p.attempt, p.resume.step if p.resume else 0) for p in prepared] == [(0, 0), (1, 4)]


def test_a_job_that_cannot_resume_makes_no_checkpoints_and_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scheduler_world, "profile_of", lambda request: dataclasses.replace(profile_of(request), resumable=False)
    )
    world = settled(checkpoint_every=2, ranks=1)
    world.submit("a", make_request(steps=6), attached=False)
    while not any(isinstance(op, m.Denoise) and op.units[0].step == 5 for op in ops_of(world, "a")):
        world.sweep()
    world.end_group(0)
    world.quiesce()
    assert world.published["a"].status == m.Status.COMPLETED
    ops = ops_of(world, "a")
    assert not [op for op in ops if isinstance(op, m.Checkpoint)]
    assert [(p.attempt, p.resume) for p in ops if isinstance(p, m.Prepare)] == [(0, None), (1, None)]
    world.submit("b", make_request(steps=50), attached=False)
    for _ in range(6):
        world.sweep()
    world.feed(SupervisorSaid(m.Drain(2.0)))
    for _ in range(20):
        world.tick()
        world.sweep()
    assert world.drained
    assert not [op for op in ops_of(world, "b") if isinstance(op, m.Checkpoint)]


def test_finished_outputs_are_kept_when_the_group_dies() -> None:
    world = settled(checkpoint_every=0, ranks=1)
    world.submit("a", make_request(outputs=2))
    while not any(isinstance(op, m.Prepare) and op.index == 1 for op in ops_of(world, "a")):
        world.sweep()
    world.end_group(0)
    world.quiesce()
    assert [(p.attempt, p.index) for p in ops_of(world, "a") if isinstance(p, m.Prepare)] == [(0, 0), (0, 1), (1, 1)]


def test_a_new_scheduler_adopts_what_the_workers_hold() -> None:
    world = settled(checkpoint_every=0)
    world.submit("a", make_request(steps=6))
    while not any(isinstance(op, m.Denoise) and op.units[0].step == 3 for op in ops_of(world, "a")):
        world.sweep()
    world.restart_scheduler(lossless=True)
    world.quiesce()
    assert len([op for op in ops_of(world, "a") if isinstance(op, m.Encode | m.Prepare)]) == 2
    assert world.deaths == 0
    assert world.published["a"].status == m.Status.COMPLETED


def test_ranks_that_received_different_plans_are_started_again() -> None:
    world = settled(ranks=2)
    world.restart_scheduler()
    for rank in world.ranks[0]:
        rank.received_epoch, rank.received, rank.done = 1, 5 + rank.rank, 5 + rank.rank
    world.submit("a", make_request())
    world.quiesce()
    assert world.deaths == 1


def test_output_restart_decodes_again_under_a_new_take() -> None:
    world = settled(slots=1)
    world.submit("a", make_request(chunks=3))
    while not any(isinstance(op, m.Decode) and op.chunk == 1 for op in ops_of(world, "a")):
        world.sweep()
    world.restart_output()
    world.quiesce()
    takes = {op.take for op in ops_of(world, "a") if isinstance(op, m.Decode)}
    assert takes == {0, 1}
    assert world.published["a"].status == m.Status.COMPLETED


def test_a_new_output_hears_of_terminals_again() -> None:
    world = settled()
    world.submit("a", make_request())
    world.quiesce()
    world.restart_output()
    world.tick()
    world.sweep()
    assert "a" in world.output.jobs


def test_a_silent_rank_is_reported_and_after_thirty_seconds_ends_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    world = settled(ranks=2)
    world.submit("a", make_request())
    world.ranks[0][1].alive = False  # it vanished and nobody saw it: no supervisor in this test
    said: list[Any] = []
    monkeypatch.setattr(world, "_supervise", said.append)
    for _ in range(34):
        world.tick()
        world.hear_rank(world.ranks[0][0])
        world.hear_rank(world.ranks[0][0])
    assert isinstance(said[0], m.RankSilent)
    assert isinstance(said[-1], m.KillGroup)
    assert 20 <= sum(isinstance(s, m.RankSilent) for s in said) <= 27


def test_an_op_past_its_deadline_ends_the_group() -> None:
    world = settled(ranks=1)
    world.core.state.cost.use_device("cuda")
    world.submit("a", make_request())
    world.commit()
    world.commit()
    for _ in range(40):
        world.tick()
        while world.ranks[0][0].outbox:
            world.hear_rank(world.ranks[0][0])
    assert world.deaths == 1


def test_a_reported_phase_extends_the_deadline_and_has_its_own() -> None:
    world = settled(ranks=1)
    world.core.state.cost.use_device("cuda")
    world.submit("a", make_request())
    world.commit()
    world.commit()
    rank = world.ranks[0][0]
    rank.say(m.PhaseReport(0, 0, rank.epoch, "compiling", 60.0))
    for second in range(70):
        assert world.deaths == 0 or second > 60
        world.tick()
        while rank.outbox and rank.alive:
            world.hear_rank(rank)
    assert world.deaths == 1


def test_a_group_given_up_fails_all_jobs_only_when_it_was_the_last() -> None:
    world = settled(groups=2)
    world.submit("a", make_request(steps=6, outputs=3))
    error = m.ErrorInfo("startup_error", "no device")
    for rank in world.ranks[1]:
        rank.alive = False
    world.feed(SupervisorSaid(m.GroupGivenUp(1, error)))
    world.sweep()
    assert "a" in world.core.state.jobs
    world.feed(SupervisorSaid(m.GroupGivenUp(0, error)))
    world.sweep()
    assert world.published["a"].error == error
    assert ask(world, m.Submit("b", "me", make_request())).error.code == "worker_lost"


def test_detached_jobs_outlive_the_last_group() -> None:
    world = settled()
    world.submit("a", make_request(), attached=False)
    for rank in world.ranks[0]:
        rank.alive = False
    world.feed(SupervisorSaid(m.GroupGivenUp(0, m.ErrorInfo("startup_error", "no device"))))
    world.sweep()
    assert "a" in world.core.state.jobs
    assert "a" not in world.published


def test_the_saving_after_a_grace_waits_for_the_long_plans_under_way() -> None:
    world = settled(checkpoint_every=0)
    world.submit("a", make_request(steps=50), attached=False)
    for _ in range(6):
        world.sweep()
    state = world.core.state
    outstanding = state.groups[0].outstanding
    assert outstanding
    for plan in outstanding:
        plan.predicted_ms = 20_000.0  # two steps of a large model
    world.feed(SupervisorSaid(m.Drain(0.0)))
    for _ in range(30):  # seconds in which the worker still computes
        world.tick()
    assert not world.drained
    for _ in range(10):
        world.sweep()
    assert world.drained
    assert state.jobs["a"].checkpoint is not None


def test_drain_refuses_new_jobs_finishes_the_others_and_says_so() -> None:
    world = settled()
    world.submit("a", make_request())
    world.sweep()
    world.feed(SupervisorSaid(m.Drain(60.0)))
    assert ask(world, m.Submit("b", "me", make_request())).error.code == "overloaded"
    assert not world.drained
    world.quiesce()
    assert world.drained
    assert world.published["a"].status == m.Status.COMPLETED


def test_the_end_of_the_grace_cancels_attached_jobs_and_saves_detached_ones() -> None:
    world = settled(checkpoint_every=0)
    world.submit("attached", make_request(steps=50))
    world.submit("detached", make_request(steps=50), attached=False)
    for _ in range(6):
        world.sweep()
    world.feed(SupervisorSaid(m.Drain(2.0)))
    for _ in range(20):
        world.tick()
        world.sweep()
    assert world.drained
    assert world.published["attached"].status == m.Status.CANCELLED
    assert "detached" not in world.published
    world.restart_scheduler()
    world.quiesce()
    assert world.published["detached"].status == m.Status.COMPLETED


def test_messages_of_old_epochs_and_unknown_groups_change_nothing() -> None:
    world = settled()
    world.end_group(0)
    world.quiesce()
    before = world.core.state.groups[0].epoch
    for epoch, group in ((0, 0), (0, 7), (5, -1)):
        assert tell(world, RankSaid(m.PlanDone(1, group, 0, epoch, 0, ()))) == []
        assert tell(world, RankSaid(m.GroupFailed(group, 0, epoch, m.ErrorInfo("x", "y")))) == []
    assert tell(world, OutputSaid(m.SlotReleased(99, "a", 0, 0, 0, 0))) == []
    assert world.core.state.groups[0].epoch == before


def test_status_tells_what_is_ready() -> None:
    world = World(groups=2)
    assert not ask(world, m.QueryStatus()).ready
    world = settled(groups=2)
    status = ask(world, m.QueryStatus())
    assert status.ready
    assert [(g.phase, g.ready_ranks) for g in status.groups] == [("ready", 2), ("ready", 2)]


def test_two_groups_share_the_work() -> None:
    world = settled(groups=2)
    for n in range(6):
        world.submit(f"j{n}", make_request())
    world.quiesce()
    encoded = [p.group for p in world.plans.values() for op in p.ops if isinstance(op, m.Encode)]
    assert min(encoded.count(0), encoded.count(1)) >= 2


def test_plans_are_bounded_by_max_plan_ms() -> None:
    world = settled()
    world.submit("a", make_request(steps=6))
    world.submit("b", make_request(steps=6))
    world.quiesce()
    sizes = {sum(isinstance(op, m.Denoise | m.Decode | m.Encode) for op in p.ops) for p in world.plans.values()}
    assert max(sizes) <= 3  # a step costs 1 ms, encoding and decoding half of it


@pytest.mark.parametrize("name", ["fair", "fcfs"])
def test_a_long_job_ends_under_an_endless_stream_of_short_ones(name: str) -> None:
    world = settled(policy_name=name, ranks=1)
    world.submit("long", make_request(steps=60, outputs=2, size=2), priority=m.Priority.LOW)
    for n in range(4000):
        if len(world.core.state.jobs) < 8:
            world.submit(f"short{n}", make_request(steps=1, chunks=1), priority=m.Priority.HIGH)
        world.sweep()
        if n % 10 == 0:
            world.tick(0.1)
        if "long" in world.published:
            return
    pytest.fail("the long job starved")


def test_a_short_job_is_not_stuck_behind_long_ones_under_fair() -> None:
    world = settled(ranks=1)
    for n in range(5):
        world.submit(f"long{n}", make_request(steps=100))
    for _ in range(30):
        world.sweep()
    world.submit("short", make_request(steps=2))
    world.quiesce()
    assert world.finished_order[0] == "short"


# --------------------------------------------------------------------------------------------------------------------
# The small parts


def view(seq: int, work: float, priority: m.Priority = m.Priority.NORMAL, at: float = 0.0) -> JobView:
    return JobView(seq, at, priority, work)


def test_policies_order_jobs() -> None:
    short_late, long_early = view(2, 1.0, at=5.0), view(1, 50.0)
    assert min([short_late, long_early], key=policy.by_name("fcfs").lanes[0].key) is long_early
    assert min([short_late, long_early], key=policy.by_name("sjf").lanes[0].key) is short_late
    fair = policy.by_name("fair")
    assert min([short_late, long_early], key=fair.lanes[0].key) is short_late
    assert min([short_late, long_early], key=fair.lanes[1].key) is long_early
    high, low = view(9, 10.0, m.Priority.HIGH), view(3, 10.0, m.Priority.LOW)
    assert all(lane.key(high) < lane.key(low) for lane in fair.lanes)
    aged = view(3, 10.0, m.Priority.LOW, at=-400.0)
    assert fair.lanes[1].key(aged) < fair.lanes[1].key(high)
    assert [fair.turn(used) for used in ([0.0, 0.0], [1.0, 0.0], [2.9, 1.0], [3.1, 1.0])] == [0, 1, 0, 1]


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="'random'"):
        policy.by_name("random")


def test_cost_model_learns_rates_and_predicts_what_is_left() -> None:
    cost, profile = CostModel(), profile_of(make_request(steps=4, outputs=2, chunks=3, size=2))
    cost.use_device("cuda:0")
    step = m.Denoise((m.UnitRef("a", 0, 0, 0),))
    assert cost.op_ms(step, profile) == pytest.approx(2 * 3.3)
    cost.learn(step, profile, 200.0)
    cost.learn(step, profile, 100.0)
    assert cost.op_ms(step, profile) == pytest.approx(180.0)
    cost.learn(m.Decode("a", 0, 0, 0, 0, 0), profile, 10.0)
    left = cost.remaining_ms(profile, Cursor(0, Stage.DENOISE, 3), outputs_left=2)
    assert left == pytest.approx(180 + 30 + 4 * 180 + 30)
    assert cost.remaining_ms(profile, Cursor(1, Stage.DECODE, 2), outputs_left=1) == pytest.approx(10)
    assert cost.remaining_ms(profile, Cursor(1, Stage.SAVE), outputs_left=1) == 0


def test_preparations_that_encode_are_learned_apart_and_counted() -> None:
    plain = profile_of(make_request(steps=4, outputs=2, size=1))
    costly = dataclasses.replace(plain, prepare_cost=3.0)
    cost = CostModel()
    cost.use_device("cuda:0")
    prepare = m.Prepare("a", 0, 0)
    assert cost.op_ms(prepare, costly) == pytest.approx(3.3 * 3)
    cost.learn(prepare, costly, 60.0)
    assert cost.op_ms(prepare, costly) == pytest.approx(60.0)
    assert cost.op_ms(prepare, plain) == pytest.approx(PREPARE_MS)
    for at, ahead in ((Cursor(0, Stage.PREPARE), 2), (Cursor(0, Stage.DENOISE), 1)):
        more = cost.remaining_ms(costly, at, outputs_left=2) - cost.remaining_ms(plain, at, outputs_left=2)
        assert more == pytest.approx(60.0 * ahead)
    assert costly.total_cost == pytest.approx(plain.total_cost + 6.0)
