"""The worker groups: what ranks and the supervisor say, who is alive, and how a group is taken over or given up."""

from __future__ import annotations

import math

from safelight.runtime import messages as m
from safelight.runtime.scheduler import checkpoints, lifecycle, planning
from safelight.runtime.scheduler.jobs import Cursor, Run, Stage, at_step
from safelight.runtime.scheduler.slots import Attempt
from safelight.runtime.scheduler.state import Group, Rank, State

SILENT_S = 4.0  # looked at each second: a stopped process is dead within 5 s
DEAD_S = 30.0
START_LIMIT_S = 1800.0  # of a rank that was never heard of; it may import torch from a slow disk
DEADLINE_FACTOR = 10.0
DIVERGED_S = 5.0  # inventories that differ for so long will not agree any more
SETTLE_S = 120.0  # plans of an earlier scheduler finish within this


def rank_said(s: State, message: m.FromWorker) -> None:
    g = _current(s, message.group, message.group_epoch)
    if g is None:
        return
    if isinstance(message, m.CheckpointCommitted | m.CheckpointFailed):
        checkpoints.said(s, message)
        return
    rank = g.ranks.setdefault(message.rank, Rank(s.now))
    rank.heard_at, rank.heard = s.now, True
    if isinstance(message, m.PlanDone):
        if message.scheduler_epoch == s.epoch and (reason := planning.acknowledge(s, g, message)):
            kill(s, g, reason)
    elif isinstance(message, m.Heartbeat):
        _heartbeat(s, g, message)
    elif isinstance(message, m.Ready):
        _ready(s, g, rank, message)
    elif isinstance(message, m.Inventory):
        if message.scheduler_epoch == s.epoch and not g.settled:
            rank.inventory = message
            _reconcile(s, g)
    elif isinstance(message, m.PhaseReport):
        rank.phase_until = s.now + message.limit_s
        g.phase = g.phase if g.settled else message.phase
    else:
        kill(s, g, f"rank {message.rank} failed: {message.error.message}")


def supervisor_said(s: State, message: m.RankExited | m.GroupStarting | m.GroupGivenUp) -> None:
    g = s.groups.get(message.group)
    if g is None:
        return
    if isinstance(message, m.GroupGivenUp):
        _given_up(s, g, message.error)
    elif message.group_epoch >= g.epoch:
        if message.group_epoch > g.epoch:
            _new_epoch(s, g, message.group_epoch)
        if isinstance(message, m.GroupStarting):
            g.world_size = message.world_size
            for rank in range(message.world_size):
                g.ranks.setdefault(rank, Rank(s.now, phase_until=s.now + START_LIMIT_S))
        elif g.alive:
            _die(s, g)


def rank_unreachable(s: State, group: int, rank: int, group_epoch: int) -> None:
    g = s.groups[group]
    if g.epoch == group_epoch and g.alive:
        kill(s, g, f"rank {rank} takes no messages")


def kill(s: State, g: Group, reason: str) -> None:
    """For the scheduler the group is dead from now on; the supervisor makes it true."""
    s.to_supervisor(m.KillGroup(g.id, g.epoch, reason))
    _die(s, g)


def _die(s: State, g: Group) -> None:
    g.phase = "dead"
    lifecycle.lose(s, g)
    release_awaiting(s, g.id, g.epoch)


def _current(s: State, group: int, epoch: int) -> Group | None:
    """The group, if the message is of its living epoch; a newer epoch replaces the one known."""
    g = s.groups.get(group)
    if g is None or epoch < g.epoch:
        return None
    if epoch > g.epoch:
        _new_epoch(s, g, epoch)
    return g if g.alive else None


def _new_epoch(s: State, g: Group, epoch: int) -> None:
    """New processes: those of the old epoch are gone for certain."""
    if g.alive:
        lifecycle.lose(s, g)
    release_awaiting(s, g.id, epoch - 1)
    _gone(s, g)
    g.epoch, g.phase, g.settled = epoch, "starting", False
    g.ranks.clear()
    g.next_number, g.unsettled_since = 0, None
    s.cost.forget(g.id)


def _gone(s: State, g: Group) -> None:
    for attempt in g.dying:
        s.slots.ranks_let_go(*attempt)
    g.dying.clear()


def _given_up(s: State, g: Group, error: m.ErrorInfo) -> None:
    if g.alive:
        _die(s, g)
    _gone(s, g)
    g.phase = "given up"
    s.unsettled.discard(g.id)
    release_awaiting(s, g.id)
    if all(other.phase == "given up" for other in s.groups.values()):
        for job in list(s.jobs.values()):
            if job.attached:  # detached ones go on at the next start, perhaps on a better machine
                lifecycle.end(s, job, m.Status.FAILED, error)


def release_awaiting(s: State, group: int, through_epoch: float = math.inf) -> None:
    """Jobs that an earlier scheduler had placed in these epochs of a group are not there any more: they start again."""
    waiting = s.awaiting.pop(group, [])
    if later := [job for job in waiting if job.home_epoch > through_epoch]:
        s.awaiting[group] = later
    for job in waiting:
        if job.home_epoch <= through_epoch:
            lifecycle.enqueue(s, job)


# --------------------------------------------------------------------------------------------------------------------
# Joining: Ready and Inventory of every rank, then plan 0


def _heartbeat(s: State, g: Group, message: m.Heartbeat) -> None:
    g.world_size = message.world_size
    if not message.ready and message.last_received < 0:
        s.unsettled.discard(g.id)  # it has never had a plan, so nobody of it writes to a slot
    elif message.ready and not g.settled:
        s.to_rank(g, message.rank, m.InventoryRequest(s.epoch))


def _ready(s: State, g: Group, rank: Rank, message: m.Ready) -> None:
    rank.ready, rank.phase_until = message, None
    g.world_size = message.world_size
    s.cost.use_device(message.device)
    if g.settled:
        return
    if rank.inventory is None:
        s.to_rank(g, message.rank, m.InventoryRequest(s.epoch))
    _reconcile(s, g)


def _reconcile(s: State, g: Group) -> None:
    """Adopts the group once every rank has finished the same last plan; kills it when they will never agree."""
    ranks = [g.ranks[r] for r in range(g.world_size) if r in g.ranks]
    reports = [(r.ready, r.inventory) for r in ranks]
    known = [(ready, inventory) for ready, inventory in reports if ready is not None and inventory is not None]
    if len(known) < g.world_size:
        return
    g.unsettled_since = s.now if g.unsettled_since is None else g.unsettled_since
    waited = s.now - g.unsettled_since
    if len({(i.received_epoch, i.last_received) for _, i in known}) > 1:
        if waited > DIVERGED_S:
            kill(s, g, "its ranks received different plans from the scheduler before this one")
    elif all(i.last_done == i.last_received for _, i in known):
        g.memory.budget = min(r.capacity_bytes - r.weights_bytes - r.reserve_bytes for r, _ in known)
        g.memory.encode_bytes = max(r.encode_bytes for r, _ in known)
        g.budget_known = True
        _adopt(s, g, [i for _, i in known])
    elif waited > SETTLE_S:
        kill(s, g, f"its ranks did not finish the plans of the scheduler before this one within {SETTLE_S:.0f} s")


def _adopt(s: State, g: Group, inventories: list[m.Inventory]) -> None:
    """Takes over what all ranks hold of living jobs; the first plan drops the rest."""
    g.settled, g.phase, g.unsettled_since = True, "ready", None
    s.unsettled.discard(g.id)
    s.admit_due = True
    held = [{(h.job, h.attempt, h.index, h.step) for h in i.states} for i in inventories]
    common: dict[Attempt, dict[int, int]] = {}
    for job, attempt, index, step in sorted(set.intersection(*held)):
        common.setdefault((job, attempt), {})[index] = step
    for key in sorted({(job, attempt) for states in held for job, attempt, _, _ in states}):
        if not _adopt_attempt(s, g, key, common.get(key, {})):
            g.control.append(m.Drop(*key))
            g.memory.take_rest(key)
    checkpoints.delete_unread(s, g)
    release_awaiting(s, g.id)


def _adopt_attempt(s: State, g: Group, key: Attempt, states: dict[int, int]) -> bool:
    job = s.jobs.get(key[0])
    if job is None or job not in s.awaiting.get(g.id, []) or job.attempt != key[1] or -1 not in states:
        return False
    if job.suspect_until is not None:
        return False
    index = job.next_index
    at = at_step(index, states[index], job.profile) if index in states else Cursor(index, Stage.PREPARE)
    run = Run(job, g.id, job.attempt, at, at, lifecycle.first_take(s), s.now, job.resume_ref(index), admitted=True)
    lifecycle.dequeue(s, job)
    lifecycle.place(s, g, run)
    g.control += [m.Release(*key, other) for other in states if other not in (-1, index)]
    if at.stage != Stage.PREPARE:
        planning.open_take(s, run)
    return True


# --------------------------------------------------------------------------------------------------------------------
# Watching


def watch(s: State) -> None:
    """Every second: silence, phases and ops that take too long."""
    for g in s.groups.values():
        if g.alive and (reason := _overdue(s, g)):
            kill(s, g, reason)


def _overdue(s: State, g: Group) -> str | None:
    for number, rank in g.ranks.items():
        silence = s.now - rank.heard_at
        if rank.heard and silence > DEAD_S:
            return f"rank {number} has been silent for {silence:.0f} s"
        if silence > SILENT_S:
            s.to_supervisor(m.RankSilent(g.id, number, g.epoch, silence))
        if rank.phase_until is not None and s.now > rank.phase_until:
            return f"rank {number} exceeded the limit of its phase {g.phase!r}"
    if not g.outstanding:
        return None
    first = g.outstanding[0]
    allowed = max(s.config.min_op_deadline_s, DEADLINE_FACTOR * first.predicted_ms / 1000)
    until = max([first.started_at + allowed, *(r.phase_until for r in g.ranks.values() if r.phase_until is not None)])
    if s.now <= until:
        return None
    late = sorted(set(range(g.world_size)) - set(first.acks))
    return f"plan {first.plan.number} was not finished by ranks {late} within {allowed:.0f} s"
