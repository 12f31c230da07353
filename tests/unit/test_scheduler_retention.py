"""Ended jobs: listed in order, forgotten on demand, by age, by number and by bytes; and the same after a restart."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

from scheduler_world import World, make_request

from safelight.runtime import messages as m
from safelight.runtime.scheduler.events import ClientSaid, DeleteFile, JournalCommitted, JournalWrite, SendClient, Tick
from safelight.runtime.scheduler.records import ForgetRecord, replay


def settled(**limits: Any) -> World:
    """A world with a ready group, in which these limits of CoreConfig hold."""
    world = World()
    world.config = dataclasses.replace(world.config, **limits)
    world.core.state.config = world.config
    for _ in range(3):
        world.tick()
        world.sweep()
    return world


def run(world: World, *jobs: str, origin: str = "videos") -> None:
    for job in jobs:
        world.submit(job, make_request(steps=2), attached=False, origin=origin)
    world.quiesce()


def ask(world: World, message: m.ToScheduler) -> Any:
    """The answer, once the journal has what it promises."""
    actions = deque(world.core.handle(ClientSaid(b"asker", message), world.now))
    while actions:
        action = actions.popleft()
        if isinstance(action, SendClient):
            return action.message
        world._carry_out(action)
        if not actions:
            token = world.unwritten[-1][0]
            world.records += [record for _, record in world.unwritten]
            world.unwritten.clear()
            actions += world.core.handle(JournalCommitted(token), world.now)
    raise AssertionError(f"no answer to {message}")


def listed(world: World, **options: Any) -> list[str]:
    answer = ask(world, m.ListJobs("q", "me", "videos", **options))
    assert isinstance(answer, m.JobPage), answer
    return [state.job for state in answer.jobs]


def test_jobs_are_listed_by_origin_in_pages() -> None:
    world = settled()
    run(world, "a", "b", "c")
    run(world, "picture", origin="images")
    assert listed(world) == ["c", "b", "a"]
    assert listed(world, descending=False, limit=2) == ["a", "b"]
    assert listed(world, after="b") == ["a"]
    page = ask(world, m.ListJobs("q", "me", "videos", limit=2))
    assert page.has_more
    assert ask(world, m.ListJobs("q", "other", "videos")).jobs == ()
    assert isinstance(ask(world, m.ListJobs("q", "me", "videos", after="picture")), m.Refused)


def test_a_job_tells_what_it_was_and_how_far_it_is() -> None:
    world = settled()
    world.submit("a", make_request(steps=4, outputs=2), attached=False, origin="videos")
    world.commit()
    state = ask(world, m.QueryJob("a", "me"))
    assert (state.stage, state.progress, state.info.num_outputs) == (m.Stage.ENCODING, 0.0, 2)
    assert state.eta_ms > 0
    seen = [0.0]
    while (state := ask(world, m.QueryJob("a", "me"))).status is None:
        seen.append(state.progress)
        world.sweep()
        world.tick()
    assert seen == sorted(seen)
    assert 0 < max(seen) < 1
    assert (state.status, state.progress, state.info.ended_at) == (m.Status.COMPLETED, 1.0, state.info.ended_at)
    assert state.info.ended_at >= state.info.created_at


def test_forgetting_a_job_deletes_its_files_before_its_record() -> None:
    world = settled()
    run(world, "a", "b")
    (path,) = (artifact.path for artifact in world.published["a"].artifacts)
    actions = world.core.handle(ClientSaid(b"x", m.Forget("a", "me")), world.now)
    assert [type(action) for action in actions] == [DeleteFile, JournalWrite]
    assert isinstance(actions[0], DeleteFile)
    assert isinstance(actions[1], JournalWrite)
    assert (actions[0].path, actions[1].record) == (path, ForgetRecord("a"))
    world.core.handle(JournalCommitted(actions[1].token), world.now)
    assert isinstance(ask(world, m.QueryJob("a", "me")), m.Refused)
    assert isinstance(ask(world, m.Forget("a", "me")), m.Refused)
    assert isinstance(ask(world, m.Forget("b", "other")), m.Refused)
    assert ask(world, m.Forget("b", "me")) == m.Forgotten("b")


def test_forgetting_a_running_job_ends_it_first() -> None:
    world = settled()
    world.submit("a", make_request(steps=4), attached=False, origin="videos")
    world.commit()
    world.sweep()
    world.expected["a", "submit"] = 0
    assert ask(world, m.Forget("a", "me")) == m.Forgotten("a")
    assert isinstance(ask(world, m.QueryJob("a", "me")), m.Refused)
    assert listed(world) == []
    assert not [h for h in replay(world.records) if h.submit.job == "a"]


def test_the_oldest_go_by_age_number_and_bytes() -> None:
    world = settled(artifact_ttl_s=100.0)
    run(world, "a")
    world.now += 60
    run(world, "b")
    world.now += 60
    world.feed(Tick())
    assert listed(world) == ["b"]
    world = settled(keep_ended=2)
    run(world, "a", "b", "c")
    assert len(listed(world)) == 2
    world = settled(artifact_quota_bytes=1)  # a fake file has one byte
    run(world, "a")
    run(world, "b")
    assert listed(world) == ["b"]
    assert world.core.state.stored_bytes == 1


def test_a_restarted_scheduler_lists_and_forgets_as_before() -> None:
    world = settled(artifact_ttl_s=100.0)
    run(world, "a")
    world.now += 60
    run(world, "b")
    before = ask(world, m.ListJobs("q", "me", "videos"))
    world.restart_scheduler(lossless=True)
    assert ask(world, m.ListJobs("q", "me", "videos")) == before
    world.now += 60
    world.restart_scheduler(lossless=True)
    assert listed(world) == ["b"]
