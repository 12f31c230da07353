"""Which replica will finish a waiting job first.

Predicted: the plans that the group was sent, what its residents have left, at the rates measured on that group, as far
as it goes before the job under the policy, and the job itself. Waiting jobs are looked at in the policy's order; one
that would finish earlier where there is no room now waits for it, and counts as work of that group for those behind
it. So a slow replica gets less, in proportion to what it does; it is never given a job that would be done sooner after
its faster neighbour's queue; and among equal replicas the least loaded one is served.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from safelight.configs.profile import JobProfile
from safelight.runtime.scheduler.admission import view
from safelight.runtime.scheduler.jobs import Cursor, Job, Stage
from safelight.runtime.scheduler.policy import Lane
from safelight.runtime.scheduler.state import Group, State

WINDOW = 64  # waiting jobs of a lane that are looked at
TARGET_BUSY = 2  # jobs with work that a group holds at least: one runs, one is there when it waits


@dataclass(slots=True)
class Load:
    """What a group is or will be busy with, as one lane sees it."""

    group: Group
    lane: Lane
    residents: list[tuple[float, float]]  # key in the lane, predicted ms
    sent: float  # of plans that were sent: nothing goes before those
    total: float
    counted: float = 0.0  # of waiting jobs, which all go before those that are looked at after them

    @property
    def has_room(self) -> bool:
        return sum(run.busy for run in self.group.residents.values()) < TARGET_BUSY

    def finish_ms(self, key: float, ms: float) -> float:
        """When a job is done: after what goes before it, at the lane's share of the time; after all at the latest."""
        ahead = self.counted + sum(left for other, left in self.residents if other <= key)
        return self.sent + min((ahead + ms) / self.lane.share, self.total + self.counted + ms)


def choose(s: State, groups: Iterable[Group], lane: int) -> dict[int, Job]:
    """By group, the first waiting job of a lane that it would finish before every other group would.

    Looks no further than it takes to find one for each group with room.
    """
    loads = [_load(s, g, lane) for g in groups]
    if len(loads) < 2:
        head = s.queue.head(lane)
        return {loads[0].group.id: head} if loads and head is not None else {}
    found: dict[int, Job] = {}
    searching = {load.group.id for load in loads if load.has_room}
    for job in s.queue.first(lane, WINDOW if searching else 1):
        soonest, best, ms = math.inf, loads[0], 0.0
        for load in loads:
            if not _can_hold(s, load.group, job.profile):
                continue
            predicted = work_ms(s, job, load.group.id)
            done = load.finish_ms(load.lane.key(view(job, predicted)), predicted)
            if done < soonest:
                soonest, best, ms = done, load, predicted
        found.setdefault(best.group.id, job)  # none can hold it: the first says so, or it waits for one that starts
        best.counted += ms
        searching.discard(best.group.id)
        if not searching:
            break
    return found


def work_ms(s: State, job: Job, group: int | None) -> float:
    """Predicted work that is left of a job, if it goes on in that group (None: at the speed of all groups)."""
    at = job.run.planned if job.run else Cursor(0, Stage.ENCODE)
    return s.cost.remaining_ms(job.profile, at, job.profile.outputs - len(job.artifacts), group)


def _load(s: State, g: Group, lane: int) -> Load:
    by = s.config.policy.lanes[lane]
    left = [(run.job, work_ms(s, run.job, g.id)) for run in g.residents.values()]
    sent = 0.0
    if g.outstanding:
        sent = sum(o.predicted_ms for o in g.outstanding) - 1000 * (s.now - g.outstanding[0].started_at)
    keys = [(by.key(view(job, ms)), ms) for job, ms in left]
    return Load(g, by, keys, max(0.0, sent), sum(ms for _, ms in left))


def _can_hold(s: State, g: Group, profile: JobProfile) -> bool:
    """Whether the job fits into the group when nothing else is in it."""
    return profile.held_bytes + s.peaks.peak(profile, g.memory.encode_bytes) <= g.memory.budget
