"""Plans: what a group does next, and what its acknowledgements mean.

A plan is bounded by `max_plan_ms` of predicted cost (by default the longest step of any resident) and holds at least
one op when there is work. At most two plans of a group are outstanding; ops are planned as if those succeed. When an
op failed, the later ops of its job come back as errors of an attempt that was dropped by then, and are discarded.
"""

from __future__ import annotations

from safelight.configs.previews import preview_steps
from safelight.runtime import messages as m
from safelight.runtime.scheduler import checkpoints, lifecycle
from safelight.runtime.scheduler.jobs import Run, Stage
from safelight.runtime.scheduler.state import Group, Outstanding, State

MAX_OUTSTANDING = 2
QUARANTINE_S = 2.0
MAX_OPS = 16  # computing ops of one plan


def plan(s: State, g: Group) -> None:
    """Sends plans while the group takes them and there is something to do."""
    while g.usable and len(g.outstanding) < MAX_OUTSTANDING:
        ops: list[m.Op] = g.control
        g.control = []
        computed = [] if s.stopped else _computing_ops(s, g)
        predicted = sum(ms for _, ms in computed)
        for op, _ in computed:
            ops.append(op)
            if (checkpoint := _checkpoint_after(s, op)) is not None:
                ops.append(checkpoint)
            ops += _previews_after(s, op)
        if not ops:
            return
        sent = m.Plan(s.epoch, g.id, g.epoch, g.next_number, tuple(ops))
        g.next_number += 1
        g.outstanding.append(Outstanding(sent, predicted, s.now))
        for rank in range(g.world_size):
            s.to_rank(g, rank, sent)


def _computing_ops(s: State, g: Group) -> list[tuple[m.Op, float]]:
    """The next ops with their predicted ms, in the policy's order; advances the planned cursors."""
    ops: list[tuple[m.Op, float]] = []
    total, bound = 0.0, s.config.max_plan_ms
    while len(ops) < MAX_OPS:
        ready = [r for r in g.residents.values() if _may_run(s, r)]
        if not ready:
            break
        lane = s.config.policy.turn(g.lane_ms)
        run = ready[0]
        if len(ready) > 1:
            key = s.config.policy.lanes[lane].key
            run = min(ready, key=lambda r: (key(lifecycle.run_view(s, r)), r.job.seq))
        ms = s.cost.op_ms(run.op(-1), run.job.profile, g.id)
        if ops:
            if bound is None:
                bound = max(s.cost.step_ms(r.job.profile, g.id) for r in g.residents.values())
            if total + ms > bound:
                break
        total += ms
        g.lane_ms[lane] += ms
        ops.append((_take_op(s, run), ms))
    return ops


def _may_run(s: State, run: Run) -> bool:
    if not run.admitted or not run.busy:
        return False
    if run.planned.stage != Stage.DECODE:
        return True
    return s.output.ready and bool(s.slots.free) and not s.unsettled


def _take_op(s: State, run: Run) -> m.Op:
    """The run's next op, with a slot if it needs one; moves `planned` behind it."""
    at, slot = run.planned, -1
    if at.stage == Stage.DECODE:
        slot = s.slots.grant(*run.key, at.index, run.take, at.k)
    elif at.stage == Stage.PREPARE:
        open_take(s, run)
    op = run.op(slot)
    run.planned = at.after(run.job.profile, run.resume)
    s.admit_due = s.admit_due or not run.busy
    return op


def open_take(s: State, run: Run) -> None:
    """Tells output which chunks will come, long before they do."""
    run.take_open = True
    s.to_output(m.OpenTake(*run.key, run.planned.index, run.take))


def _checkpoint_after(s: State, op: m.Op) -> m.Checkpoint | None:
    if not isinstance(op, m.Denoise) or s.config.checkpoint_every <= 0:
        return None
    unit = op.units[0]
    if not s.jobs[unit.job].profile.resumable:
        return None
    due = (unit.step + 1) % s.config.checkpoint_every == 0
    return m.Checkpoint(unit.job, unit.attempt, unit.index, unit.step + 1) if due else None


def _previews_after(s: State, op: m.Op) -> list[m.Preview]:
    """The previews that are due when a step is done. They cost next to nothing, and no slot; without an output process
    that would send them on, none are made."""
    if not isinstance(op, m.Denoise) or not s.output.ready:
        return []
    due = []
    for unit in op.units:
        job = s.jobs[unit.job]
        steps = preview_steps(job.request.previews, job.profile.steps) if job.request.previews > 0 else ()
        if unit.step + 1 in steps:
            due.append(m.Preview(unit.job, unit.attempt, unit.index, steps.index(unit.step + 1), unit.step + 1))
    return due


# --------------------------------------------------------------------------------------------------------------------
# Acknowledgements


def acknowledge(s: State, g: Group, message: m.PlanDone) -> str | None:
    """Takes in a PlanDone of the group's current epochs; a string says why the group has to be killed."""
    rank = g.ranks.get(message.rank)
    if rank is None or message.number <= rank.done:
        return None
    waiting = {o.plan.number: o for o in g.outstanding}.get(message.number)
    if waiting is None or message.number != rank.done + 1 or len(message.results) != len(waiting.plan.ops):
        return (
            f"rank {message.rank} acknowledged plan {message.number} with {len(message.results)} results; "
            f"expected plan {rank.done + 1}, sent by this scheduler, with one result for each op"
        )
    rank.done, rank.phase_until = message.number, None
    waiting.acks[message.rank] = message
    while g.outstanding and len(g.outstanding[0].acks) == g.world_size:
        finished = g.outstanding.popleft()
        if g.outstanding:
            g.outstanding[0].started_at = s.now
        _settle(s, g, finished)
    return None


def _settle(s: State, g: Group, finished: Outstanding) -> None:
    """Every rank finished the plan."""
    ops = finished.plan.ops
    by_rank = [finished.acks[rank].results for rank in sorted(finished.acks)]
    for op, results in zip(ops, zip(*by_rank, strict=True), strict=True):
        if isinstance(op, m.Drop):
            g.memory.give_back((op.job, op.attempt))
            s.slots.ranks_let_go(op.job, op.attempt)
            checkpoints.delete_unread(s, g)
            s.admit_due = True
        else:
            _settle_op(s, g, op, results)
    computed = [op for op in ops if lifecycle.computing(op)]
    if len(computed) == 1:
        _learn_peak(s, g, computed[0], max(a.peak_bytes for a in finished.acks.values()))


def _settle_op(s: State, g: Group, op: m.Op, results: tuple[m.OpResult, ...]) -> None:
    if isinstance(op, m.Decode):
        s.slots.acknowledged(op)
    run = run_of(g, op)
    if run is None:
        return
    if isinstance(op, m.Checkpoint | m.Preview):
        return  # CheckpointCommitted or CheckpointFailed says what became of the one, nobody waits for the other
    error = next((r.error for r in results if r.error is not None), None)
    if error is not None:
        lifecycle.end(s, run.job, m.Status.FAILED, error)
        return
    ms = max(r.ms for r in results)
    g.busy_ms += ms
    s.cost.learn(op, run.job.profile, ms, g.id)
    after = run.done_after(op)
    if after is None:
        return
    if isinstance(op, m.Decode) and results[0].last_chunk != (after.stage == Stage.SAVE):
        message = f"chunk {op.chunk} of {len(run.job.profile.chunk_frames)} came with last={results[0].last_chunk}"
        lifecycle.end(s, run.job, m.Status.FAILED, m.ErrorInfo("internal", f"the decoder disagrees: {message}"))
        return
    run.done = after
    _clear_suspicion(s, run)
    _report(s, run, op)


def run_of(g: Group, op: m.Op) -> Run | None:
    """The living attempt that an op belongs to."""
    job, attempt = (op.units[0].job, op.units[0].attempt) if isinstance(op, m.Denoise) else (op.job, op.attempt)
    run = g.residents.get(job)
    return run if run is not None and run.attempt == attempt else None


def _learn_peak(s: State, g: Group, op: m.Op, measured: int) -> None:
    """`measured` counts what is held as well, and weights that came for the op."""
    run = run_of(g, op)
    known = g.memory.used + (g.memory.encode_bytes if isinstance(op, m.Encode) else 0)
    if run is not None and s.peaks.learn(op, run.job.profile, measured - known):
        for other in g.residents.values():
            peak = s.peaks.peak(other.job.profile, g.memory.encode_bytes)
            g.memory.take(other.key, other.job.profile.held_bytes, peak)


def _clear_suspicion(s: State, run: Run) -> None:
    """A suspect is cleared when it is past the point where its group died, and has been for a moment: what kills a
    worker may take time to do so."""
    job = run.job
    if job.suspect_until is None or s.now < run.entered_at + QUARANTINE_S:
        return
    if run.done.progress(job.profile) >= job.suspect_until:
        job.suspect_until, job.alone_deaths = None, 0
        s.admit_due = True


def _report(s: State, run: Run, op: m.Op) -> None:
    """Progress for every step done."""
    job, at = run.job, run.done
    eta = lifecycle.remaining_ms(s, job)
    if isinstance(op, m.Encode):
        s.to_output(m.Progress(job.id, m.Stage.ENCODING, at.index, 1, 1, eta_ms=eta))
    elif isinstance(op, m.Denoise):
        step = op.units[0].step + 1
        s.to_output(m.Progress(job.id, m.Stage.DENOISING, at.index, step, job.profile.steps, eta_ms=eta))
    elif isinstance(op, m.Decode):
        chunks = len(job.profile.chunk_frames)
        s.to_output(m.Progress(job.id, m.Stage.DECODING, at.index, op.chunk + 1, chunks, eta_ms=eta))
        if at.stage == Stage.SAVE:
            s.to_output(m.Progress(job.id, m.Stage.SAVING, at.index, eta_ms=eta))
