"""A world around the scheduler's core for tests: fake ranks, output, supervisor, clients, journal and links.

Nothing here trusts the core's own books. Ranks hold states and refuse what they do not have, output reads slots, and
`World` raises `Violation` at once when: ranks of a group get different plans or gaps, plan n+2 comes before every
rank's acknowledgement of n, a rank would exceed its memory, a slot is used while someone may still use it, a job gets
two different terminals, a client two answers.
"""

from __future__ import annotations

import random
import re
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from safelight.configs.profile import BatchKey, JobProfile, Phase
from safelight.runtime import messages as m
from safelight.runtime.errors import InvalidRequest
from safelight.runtime.scheduler import policy
from safelight.runtime.scheduler.core import SchedulerCore
from safelight.runtime.scheduler.events import (
    Action,
    ClientSaid,
    CoreEvent,
    DeleteFile,
    JournalCommitted,
    JournalWrite,
    OutputSaid,
    OutputUnreachable,
    RankSaid,
    RankUnreachable,
    SendClient,
    SendOutput,
    SendRank,
    SendSupervisor,
    SupervisorSaid,
    Tick,
)
from safelight.runtime.scheduler.records import Record, TerminalRecord, replay
from safelight.runtime.scheduler.state import CoreConfig

BUDGET = 200
CONDITIONING, STATE = 10, 20
KILLER, FAILING = "killer", "failing"


class Violation(AssertionError):
    """A promise of the scheduler is broken."""


def make_request(
    steps: int = 4, outputs: int = 1, chunks: int = 2, size: int = 1, prompt: str = "", previews: int = 0
) -> m.GenerationRequest:
    """`size` scales cost and memory; `prompt` "killer:P" kills a rank at progress P, "failing:P" is an op's error."""
    return m.GenerationRequest(
        prompt, "", {}, 8 * size, 8, chunks, 8, steps, 1.0, 0, outputs, "euler", m.MediaSpec(m.MediaFormat.PNG),
        previews=previews,
    )  # fmt: skip


def profile_of(request: m.GenerationRequest) -> JobProfile:
    """The profile of `make_request`'s requests."""
    size = request.height // 8
    if request.num_inference_steps < 1:
        raise InvalidRequest("num_inference_steps expected >= 1", param="num_inference_steps")
    shape = (1, request.num_frames, size, 1)
    return JobProfile(
        family="toy", latent_shape=shape, tokens=size, steps=request.num_inference_steps, outputs=request.num_outputs,
        phases=(Phase(0, "toy", BatchKey("toy", shape, False, 0), float(size)),),
        encode_cost=0.5, decode_chunk_cost=0.5 * size, chunk_frames=(1,) * request.num_frames, chunk_bytes=size,
        conditioning_bytes=CONDITIONING, state_bytes=STATE * size, encode_peak_bytes=15,
        step_peak_bytes=30 * size, decode_peak_bytes=40 * size,
    )  # fmt: skip


@dataclass(eq=False)
class FakeRank:
    """Executes plans op by op, exactly as sent."""

    group: int
    rank: int
    epoch: int
    world_size: int
    inbox: deque[m.ToWorker] = field(default_factory=deque)
    outbox: deque[m.FromWorker] = field(default_factory=deque)
    alive: bool = True
    stopped: bool = False
    announced: bool = False
    scheduler_epoch: int = -1
    received_epoch: int = -1
    received: int = -1
    done: int = -1
    plans: deque[m.Plan] = field(default_factory=deque)
    results: list[m.OpResult] = field(default_factory=list)
    held: dict[tuple[str, int], dict[int, int]] = field(default_factory=dict)  # index -> step
    cursors: dict[tuple[str, int, int], tuple[int, int]] = field(default_factory=dict)  # -> take, next chunk
    requests: dict[tuple[str, int], m.GenerationRequest] = field(default_factory=dict)

    def say(self, message: m.FromWorker) -> None:
        self.outbox.append(message)

    def beat(self) -> None:
        if not self.announced:
            self.announced = True
            self.say(m.PhaseReport(self.group, self.rank, self.epoch, "loading", 600.0))
            self.beat_as(ready=False)
            self.say(self.ready())
        self.beat_as(ready=True)

    def beat_as(self, ready: bool) -> None:
        self.say(
            m.Heartbeat(
                self.group,
                self.rank,
                self.world_size,
                self.epoch,
                1,
                ready,
                self.received_epoch,
                self.received,
                self.done,
            )
        )

    def ready(self) -> m.Ready:
        return m.Ready(self.group, self.rank, self.world_size, self.epoch, BUDGET + 70, 50, 20, "cpu")

    def receive(self) -> None:
        message = self.inbox.popleft()
        if isinstance(message, m.InventoryRequest):
            self.scheduler_epoch = max(self.scheduler_epoch, message.scheduler_epoch)
            states = tuple(
                m.HeldState(job, attempt, index, step)
                for (job, attempt), by_index in self.held.items()
                for index, step in by_index.items()
            )
            self.say(self.ready())
            self.say(
                m.Inventory(
                    message.scheduler_epoch, self.group, self.rank, self.epoch, self.received_epoch, self.received,
                    self.done, states,
                )
            )  # fmt: skip
        elif isinstance(message, m.Plan) and message.scheduler_epoch >= self.scheduler_epoch:
            expected = self.received + 1 if message.scheduler_epoch == self.received_epoch else 0
            if message.number != expected or message.group != self.group or message.group_epoch != self.epoch:
                raise Violation(f"rank got plan {message.number} of {message.group_epoch}, expected {expected}")
            self.scheduler_epoch = self.received_epoch = message.scheduler_epoch
            self.received = message.number
            self.plans.append(message)

    def pending_ops(self) -> list[m.Op]:
        queued = [op for p in self.inbox if isinstance(p, m.Plan) for op in p.ops]
        return [op for p in self.plans for op in p.ops][len(self.results) :] + queued

    def used(self) -> int:
        total = 0
        for key, states in self.held.items():
            profile = profile_of(self.requests[key])
            total += profile.conditioning_bytes + profile.state_bytes * sum(i >= 0 for i in states)
        return total


@dataclass(eq=False)
class Lane:
    take: m.OpenTake
    pending: deque[m.ChunkReady] = field(default_factory=deque)
    read: int = 0
    complete: bool = False


@dataclass(eq=False)
class FakeOutput:
    """Reads chunks of the newest take of each output, one at a time."""

    instance: str
    inbox: deque[m.ToOutput] = field(default_factory=deque)
    outbox: deque[m.FromOutput] = field(default_factory=deque)
    jobs: dict[str, m.OpenJob] = field(default_factory=dict)
    oldest: Counter[str] = field(default_factory=Counter)
    lanes: dict[tuple[str, int], Lane] = field(default_factory=dict)
    was_reset: bool = False

    def receive(self) -> m.ToOutput:
        message = self.inbox.popleft()
        if isinstance(message, m.OpenJob):
            self.jobs[message.job] = message
        elif isinstance(message, m.OpenTake):
            if message.job not in self.jobs:
                if self.was_reset:
                    raise Violation("OpenTake before OpenJob")
                return message  # it was meant for the process before this one
            old = self.lanes.get((message.job, message.index))
            age = (message.attempt, message.take)
            if message.attempt >= self.oldest[message.job] and (old is None or age > (old.take.attempt, old.take.take)):
                self.close(old)
                self.oldest[message.job] = message.attempt
                self.lanes[message.job, message.index] = Lane(message)
        elif isinstance(message, m.DropOutput):
            self.oldest[message.job] = max(self.oldest[message.job], message.attempt + 1)
            for key, lane in list(self.lanes.items()):
                if key[0] == message.job and lane.take.attempt <= message.attempt:
                    self.close(self.lanes.pop(key))
            self.outbox.append(m.OutputDropped(message.job, message.attempt))
        elif isinstance(message, m.OutputReset):
            for lane in self.lanes.values():
                self.close(lane)
            self.lanes.clear()
            self.was_reset = True
            self.outbox.append(m.OutputReady(self.instance, message.scheduler_epoch))
        elif isinstance(message, m.Publish):
            for key in [k for k in self.lanes if k[0] == message.job]:
                self.close(self.lanes.pop(key))
        return message

    def close(self, lane: Lane | None) -> None:
        while lane is not None and lane.pending:
            self.release(lane.pending.popleft())

    def release(self, c: m.ChunkReady) -> None:
        self.outbox.append(m.SlotReleased(c.slot, c.job, c.attempt, c.index, c.take, c.chunk))

    def wants(self, c: m.ChunkReady) -> Lane | None:
        lane = self.lanes.get((c.job, c.index))
        return lane if lane is not None and (lane.take.attempt, lane.take.take) == (c.attempt, c.take) else None

    def may_read(self, c: m.ChunkReady) -> bool:
        """Whether this chunk is or will be read, as far as messages on their way say."""
        lane = self.lanes.get((c.job, c.index))
        takes = [lane.take] if lane is not None else []
        takes += [t for t in self.inbox if isinstance(t, m.OpenTake) and (t.job, t.index) == (c.job, c.index)]
        return any((t.attempt, t.take) == (c.attempt, c.take) for t in takes)

    def chunk(self, c: m.ChunkReady) -> None:
        lane = self.wants(c)
        if lane is None:
            self.release(c)
        else:
            lane.pending.append(c)

    def read_one(self, lane: Lane) -> None:
        c = lane.pending.popleft()
        if c.chunk != lane.read:
            raise Violation(f"output got chunk {c.chunk} of {c.job}, expected {lane.read}")
        lane.read += 1
        self.release(c)
        if c.last:
            lane.complete = True
            artifact = m.Artifact(c.index, f"/{c.job}-{c.attempt}-{c.index}", "image/png", 1, "0")
            self.outbox.append(m.ArtifactCommitted(c.job, c.attempt, c.take, artifact))


class World:
    """All processes and links. Methods that begin with a verb are things that may happen at any moment."""

    def __init__(
        self, seed: int = 0, groups: int = 1, ranks: int = 2, slots: int = 3, policy_name: str = "fair",
        checkpoint_every: int = 2, max_queue: int = 1000,
    ) -> None:  # fmt: skip
        self.random = random.Random(seed)
        self.config = CoreConfig(
            groups=groups, policy=policy.by_name(policy_name), slot_count=slots, slot_bytes=100, max_queue=max_queue,
            profile_of=profile_of, checkpoint_every=checkpoint_every, job_id=re.compile("[a-z0-9]{1,26}"),
        )  # fmt: skip
        self.now = 1000.0
        self.world_size = ranks
        self.records: list[Record] = []
        self.unwritten: deque[tuple[int, Record]] = deque()
        self.epoch = 1
        self.core = SchedulerCore(self.config, 1, (), self.now)
        self.output = FakeOutput("out-0")
        self.outputs_started = 1
        self.chunks: deque[m.ChunkReady] = deque()
        self.to_core: deque[m.ToControlled] = deque()
        self.ranks: dict[int, list[FakeRank]] = {}
        self.group_epoch = dict.fromkeys(range(groups), -1)
        self.plans: dict[tuple[int, int, int, int], m.Plan] = {}
        self.acked: Counter[tuple[int, int, int, int]] = Counter()  # deliveries of PlanDone to this core
        self.submits: dict[str, m.Submit] = {}
        self.expected: Counter[tuple[str, str]] = Counter()  # (job, kind) answers that clients wait for
        self.accepted: set[str] = set()
        self.published: dict[str, m.Publish] = {}
        self.finished_order: list[str] = []
        self.deaths = 0
        self.lost_output_messages = 0
        self.drained = False
        self.files: set[str] = set()
        self.previews: list[m.Preview] = []  # that ranks made
        for group in range(groups):
            self.start_group(group)

    # ---- the core and its actions

    def feed(self, event: CoreEvent) -> None:
        for action in self.core.handle(event, self.now):
            self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, SendRank):
            self._send_rank(action)
        elif isinstance(action, SendOutput):
            self.output.inbox.append(action.message)
        elif isinstance(action, JournalWrite):
            self.unwritten.append((action.token, action.record))
        elif isinstance(action, SendClient):
            self._answer(action.message)
        elif isinstance(action, SendSupervisor):
            self._supervise(action.message)
        elif isinstance(action, DeleteFile):
            self.files.discard(action.path)

    def _send_rank(self, action: SendRank) -> None:
        members = self.ranks[action.group]
        rank = members[action.rank]
        if rank.epoch != action.group_epoch or not rank.alive:
            if isinstance(action.message, m.Plan):
                self._check_plan(action.message)
            self.to_core.append(_Unreachable(action.group, action.rank, action.group_epoch))  # type: ignore[arg-type]
            return
        if isinstance(action.message, m.Plan):
            self._check_plan(action.message)
            if action.rank == 0:
                self._check_slots(action.message, rank)
        rank.inbox.append(action.message)

    def _check_plan(self, plan: m.Plan) -> None:
        key = (plan.scheduler_epoch, plan.group, plan.group_epoch, plan.number)
        if self.plans.setdefault(key, plan) != plan:
            raise Violation(f"two different plans {key}")
        before = (*key[:3], plan.number - 2)
        if plan.number >= 2 and self.acked[before] < self.world_size:
            raise Violation(f"plan {plan.number} sent with {self.acked[before]} acknowledgements of {plan.number - 2}")

    def _check_slots(self, plan: m.Plan, receiver: FakeRank) -> None:
        for op in plan.ops:
            if not isinstance(op, m.Decode):
                continue
            if not 0 <= op.slot < self.config.slot_count:
                raise Violation(f"slot {op.slot} does not exist")
            same = [o for o in plan.ops if isinstance(o, m.Decode) and o.slot == op.slot]
            if len(same) > 1:
                raise Violation(f"slot {op.slot} granted twice in one plan")
            for group in self.ranks.values():
                if any(isinstance(o, m.Decode) and o.slot == op.slot for o in group[0].pending_ops() if group[0].alive):
                    raise Violation(f"slot {op.slot} granted while a rank will still write to it")
            unread = list(self.chunks) + [c for lane in self.output.lanes.values() for c in lane.pending]
            if any(c.slot == op.slot and self.output.may_read(c) for c in unread):
                raise Violation(f"slot {op.slot} granted while output will still read it")

    def _answer(self, message: m.FromScheduler) -> None:
        if isinstance(message, m.ServerStatus | m.JobState | m.JobPage):
            return
        if isinstance(message, m.Accepted):
            kinds = ["submit"]
            self.accepted.add(message.job)
            durable = {h.submit.job for h in replay(self.records)}
            if message.job not in durable:
                raise Violation(f"{message.job} accepted before it was journalled")
        else:
            kinds = ["cancel"] if isinstance(message, m.CancelAccepted) else ["submit", "cancel"]
        kind = next((k for k in kinds if self.expected[message.job, k] > 0), None)
        if kind is None:
            raise Violation(f"nobody waits for {message}")
        self.expected[message.job, kind] -= 1

    def _supervise(self, message: m.FromControlled) -> None:
        if isinstance(message, m.KillGroup) and self.group_epoch[message.group] == message.group_epoch:
            self.end_group(message.group)
        elif isinstance(message, m.RankSilent) and self.group_epoch[message.group] == message.group_epoch:
            if self.ranks[message.group][message.rank].stopped:
                self.end_group(message.group)
        elif isinstance(message, m.Drained):
            self.drained = True

    # ---- processes

    def start_group(self, group: int) -> None:
        self.group_epoch[group] += 1
        epoch = self.group_epoch[group]
        self.ranks[group] = [FakeRank(group, r, epoch, self.world_size) for r in range(self.world_size)]
        self.to_core.append(m.GroupStarting(group, epoch, self.world_size))

    def end_group(self, group: int) -> None:
        self.deaths += 1
        for rank in self.ranks[group]:
            rank.alive = False
        self.to_core.append(m.RankExited(group, self.group_epoch[group], "killed"))
        self.start_group(group)

    def restart_scheduler(self, lossless: bool = False) -> None:
        """The process dies with part of its queued writes done and part of its messages on the way."""
        if lossless:
            self.commit()
        for _ in range(self.random.randint(0, len(self.unwritten))):
            self.records.append(self.unwritten.popleft()[1])
        self.unwritten.clear()
        self.to_core.clear()
        everyone = [r for members in self.ranks.values() for r in members]
        for rank in [] if lossless else everyone:
            _lose_prefix(rank.outbox, self.random)
            _lose_suffix(rank.inbox, self.random)
        _lose_prefix(self.output.outbox, self.random)
        _lose_suffix(self.output.inbox, self.random)
        self.epoch += 1
        self.acked.clear()
        histories = replay(self.records)
        self.core = SchedulerCore(self.config, self.epoch, histories, self.now)
        for group, epoch in self.group_epoch.items():
            if epoch > 0:
                self.to_core.append(m.RankExited(group, epoch - 1, "before this scheduler"))
            self.to_core.append(m.GroupStarting(group, epoch, self.world_size))
        for (job, kind), count in list(self.expected.items()):
            if count > 0:  # clients whose answer is lost ask again
                self.expected[job, kind] = 0
                self.submit_again(job) if kind == "submit" else self.cancel(job)

    def restart_output(self) -> None:
        self.output = FakeOutput(f"out-{self.outputs_started}")
        self.outputs_started += 1
        _lose_prefix(self.chunks, self.random)
        if self.random.random() < 0.5:
            self.feed(OutputUnreachable())

    # ---- clients

    def submit(self, job: str, request: m.GenerationRequest, **options: Any) -> None:
        self.submits[job] = m.Submit(job, "me", request, **options)
        self.submit_again(job)

    def submit_again(self, job: str) -> None:
        self.expected[job, "submit"] += 1
        self.feed(ClientSaid(b"client", self.submits[job]))

    def cancel(self, job: str) -> None:
        self.expected[job, "cancel"] += 1
        self.feed(ClientSaid(b"client", m.Cancel(job, "me")))

    # ---- things that happen

    def tick(self, seconds: float = 1.0) -> None:
        """Time passes for everyone that is not stopped."""
        self.now += seconds
        for rank in self.live_ranks():
            if not rank.stopped:
                rank.beat()
        self.output.outbox.append(m.OutputHello(self.output.instance, 1))
        leases = tuple(j for j, s in self.submits.items() if s.attached and "abandoned" not in s.request.prompt)
        self.feed(ClientSaid(b"client", m.RenewLease(leases, "me")))
        self.feed(Tick())

    def live_ranks(self) -> list[FakeRank]:
        return [r for members in self.ranks.values() for r in members if r.alive]

    def commit(self, count: int = 1000) -> None:
        """The journal's thread commits some records."""
        token = None
        while self.unwritten and count > 0:
            token, record = self.unwritten.popleft()
            if isinstance(record, TerminalRecord) and any(
                isinstance(r, TerminalRecord) and r.job == record.job for r in self.records
            ):
                raise Violation(f"two terminals journalled for {record.job}")
            self.records.append(record)
            count -= 1
        if token is not None:
            self.feed(JournalCommitted(token))

    def hear_rank(self, rank: FakeRank) -> None:
        if rank.outbox:
            message = rank.outbox.popleft()
            if isinstance(message, m.PlanDone) and message.scheduler_epoch == self.epoch:
                self.acked[message.scheduler_epoch, message.group, message.group_epoch, message.number] += 1
            self.feed(RankSaid(message))

    def hear_output(self) -> None:
        if self.output.outbox:
            self.feed(OutputSaid(self.output.outbox.popleft()))

    def hear_supervisor(self) -> None:
        if self.to_core:
            message = self.to_core.popleft()
            if isinstance(message, _Unreachable):
                self.feed(RankUnreachable(message.group, message.rank, message.group_epoch))
            else:
                self.feed(SupervisorSaid(message))

    def output_receives(self) -> None:
        if self.output.inbox:
            message = self.output.receive()
            if isinstance(message, m.Publish):
                known = self.published.setdefault(message.job, message)
                if known != message:
                    raise Violation(f"two terminals of {message.job}: {known} and {message}")
                if known is message:
                    self.finished_order.append(message.job)
                if not any(isinstance(r, TerminalRecord) and r.job == message.job for r in self.records):
                    raise Violation(f"{message.job} published before its terminal was journalled")

    def output_takes_chunk(self) -> None:
        if self.chunks:
            self.output.chunk(self.chunks.popleft())

    def output_reads(self) -> None:
        lanes = [lane for lane in self.output.lanes.values() if lane.pending]
        if lanes:
            self.output.read_one(self.random.choice(lanes))

    def run_rank(self, rank: FakeRank) -> None:
        """Executes one op, or takes in one message."""
        if not rank.alive or rank.stopped:
            return
        if not rank.plans:
            if rank.inbox:
                rank.receive()
            return
        plan = rank.plans[0]
        result = self._execute(rank, plan.ops[len(rank.results)])
        if not rank.alive:
            return
        rank.results.append(result)
        if len(rank.results) == len(plan.ops):
            rank.plans.popleft()
            rank.done = plan.number
            done = m.PlanDone(plan.scheduler_epoch, rank.group, rank.rank, rank.epoch, plan.number, tuple(rank.results))
            rank.results = []
            rank.say(done)
        if rank.inbox and self.random.random() < 0.5:
            rank.receive()

    def _execute(self, rank: FakeRank, op: m.Op) -> m.OpResult:
        missing = m.OpResult(error=m.ErrorInfo("not_found", f"rank does not hold {op}"))
        if isinstance(op, m.Drop):
            rank.held.pop((op.job, op.attempt), None)
            return m.OpResult()
        if isinstance(op, m.Encode):
            rank.requests[op.job, op.attempt] = op.request
            rank.held[op.job, op.attempt] = {-1: 0}
            self._check_memory(rank, op)
            return m.OpResult(ms=0.5)
        unit = op.units[0] if isinstance(op, m.Denoise) else op
        key = (unit.job, unit.attempt)
        states = rank.held.get(key)
        if states is None or (not isinstance(op, m.Prepare) and unit.index not in states):
            return missing
        profile = profile_of(rank.requests[key])
        if isinstance(op, m.Prepare):
            states[op.index] = op.resume.step if op.resume else 0
            if op.resume is not None and op.resume.path not in self.files:
                raise Violation(f"{op.resume.path} was deleted before it was resumed from")
        elif isinstance(op, m.Denoise):
            if states[unit.index] != op.units[0].step:
                return missing
            if (early := self._misbehave(rank, op)) is not None:
                return early
            states[unit.index] += 1
        elif isinstance(op, m.Decode):
            if states[op.index] != profile.steps:
                return missing
            return self._decode(rank, op, profile)
        elif isinstance(op, m.Checkpoint):
            if states[op.index] != op.step:
                return missing
            if rank.rank == 0:
                ref = m.CheckpointRef(f"/{op.job}-{op.attempt}-{op.index}-{op.step}", op.step, "0")
                self.files.add(ref.path)
                rank.say(m.CheckpointCommitted(rank.group, rank.epoch, op.job, op.attempt, op.index, ref))
        elif isinstance(op, m.Preview):
            if states[op.index] != op.step:
                return missing
            if rank.rank == 0:
                self.previews.append(op)
        elif isinstance(op, m.Release):
            del states[op.index]
        self._check_memory(rank, op)
        return m.OpResult(ms=1.0)

    def _misbehave(self, rank: FakeRank, op: m.Denoise) -> m.OpResult | None:
        unit = op.units[0]
        kind, _, at = rank.requests[unit.job, unit.attempt].prompt.partition(":")
        if kind == KILLER and unit.step == int(at):
            self.end_group(rank.group)
        elif kind == FAILING and unit.step == int(at):
            return m.OpResult(error=m.ErrorInfo("job_failed", "as asked for"))
        return None

    def _decode(self, rank: FakeRank, op: m.Decode, profile: JobProfile) -> m.OpResult:
        key = (op.job, op.attempt, op.index)
        if op.chunk > 0 and rank.cursors.get(key) != (op.take, op.chunk):
            return m.OpResult(error=m.ErrorInfo("not_found", f"chunk {op.chunk} is not next"))
        rank.cursors[key] = (op.take, op.chunk + 1)
        self._check_memory(rank, op)
        last = op.chunk + 1 == len(profile.chunk_frames)
        if rank.rank != 0:
            return m.OpResult(ms=0.5)
        self.chunks.append(m.ChunkReady(op.job, op.attempt, op.index, op.take, op.chunk, last, op.slot, 1, 1, 1, 1, 0))
        return m.OpResult(ms=0.5, last_chunk=last, frames=1)

    def _check_memory(self, rank: FakeRank, op: m.Op) -> None:
        unit = op.units[0] if isinstance(op, m.Denoise) else op
        profile = profile_of(rank.requests[unit.job, unit.attempt])
        peaks = {
            m.Encode: profile.encode_peak_bytes,
            m.Denoise: profile.step_peak_bytes,
            m.Decode: profile.decode_peak_bytes,
        }
        if rank.used() + peaks.get(type(op), 0) > BUDGET:
            raise Violation(f"{rank.used()} bytes held and {peaks.get(type(op), 0)} for {op}: more than {BUDGET}")

    # ---- towards the end

    def step(self) -> None:
        """One random thing of those that happen in a healthy world."""
        rank = self.random.choice(self.live_ranks())
        happenings = (
            lambda: self.run_rank(rank), lambda: self.run_rank(rank), lambda: self.hear_rank(rank), self.commit,
            self.hear_output, self.hear_supervisor, self.output_receives, self.output_takes_chunk, self.output_reads,
        )  # fmt: skip
        self.random.choice(happenings)()

    def sweep(self) -> None:
        """Everything that is on its way arrives, everyone does something."""
        for rank in self.live_ranks():
            for _ in range(8):
                self.run_rank(rank)
            while rank.outbox:
                self.hear_rank(rank)
        self.commit()
        for _ in range(1 + len(self.to_core)):
            self.hear_supervisor()
        for _ in range(4):
            while self.output.inbox:
                self.output_receives()
            while self.chunks:
                self.output_takes_chunk()
            self.output_reads()
            while self.output.outbox:
                self.hear_output()
        self.commit()

    def quiesce(self, rounds: int = 3000) -> None:
        """Lets everything finish, then checks that nothing is lost and nothing is kept."""
        for rank in self.live_ranks():
            rank.stopped = False
        idle = 0
        for n in range(rounds):
            self.sweep()
            if n % 5 == 0:
                self.tick()
            answered = not any(v > 0 for v in self.expected.values())
            quiet = answered and not self.core.state.jobs and not self.unwritten
            idle = idle + 1 if quiet else 0
            if idle > 20:
                break
        else:
            raise Violation(f"not quiet after {rounds} rounds: {list(self.core.state.jobs.values())[:3]}")
        self.check_end()

    def check_end(self) -> None:
        lost = self.accepted - set(self.published)
        if lost:
            raise Violation(f"accepted and never ended: {sorted(lost)}")
        for job, end in self.published.items():
            outputs = self.submits[job].request.num_outputs
            if end.status == m.Status.COMPLETED and [a.index for a in end.artifacts] != list(range(outputs)):
                raise Violation(f"{job} completed with {end.artifacts}")
            if end.error is not None and end.error.code in ("not_found", "internal"):
                raise Violation(f"{job} failed by the scheduler's own fault: {end.error}")
        if len(self.core.state.slots.free) != self.config.slot_count:
            raise Violation(f"slots lost: {self.core.state.slots}")
        for rank in self.live_ranks():
            if rank.held:
                raise Violation(f"rank {rank.rank} still holds {rank.held}")
        for group in self.core.state.groups.values():
            if group.memory.used or group.outstanding or group.residents:
                raise Violation(f"group {group.id} is not free: {group}")


@dataclass(frozen=True)
class _Unreachable:
    group: int
    rank: int
    group_epoch: int


def _lose_prefix(queue: deque[Any], rng: random.Random) -> None:
    for _ in range(rng.randint(0, len(queue))):
        queue.popleft()


def _lose_suffix(queue: deque[Any], rng: random.Random) -> None:
    for _ in range(rng.randint(0, len(queue))):
        queue.pop()
