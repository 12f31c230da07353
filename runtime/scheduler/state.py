"""Everything that the scheduler's core knows, in one place; the modules around it are functions over it.

`State` also collects the actions of the event that is being handled, and runs what waits for the journal: `journal`
takes a record and a continuation that runs when the record is on disk (tokens are committed in order).
"""

from __future__ import annotations

import heapq
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from safelight.configs.profile import JobProfile
from safelight.runtime import messages as m
from safelight.runtime.scheduler.admission import Memory, PeakModel, Queue
from safelight.runtime.scheduler.cost import CostModel
from safelight.runtime.scheduler.events import (
    Action,
    DeleteFile,
    JournalWrite,
    SendClient,
    SendOutput,
    SendRank,
    SendSupervisor,
)
from safelight.runtime.scheduler.jobs import Ended, Job, Run
from safelight.runtime.scheduler.policy import Policy
from safelight.runtime.scheduler.records import Record
from safelight.runtime.scheduler.slots import Attempt, SlotLedger

JOB_ID = re.compile(r"[0-9A-Za-z]{26}")  # a ULID: slots and file names hold exactly that


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """`profile_of` validates a request and returns its profile; it raises InvalidRequest."""

    groups: int
    policy: Policy
    slot_count: int
    slot_bytes: int
    max_queue: int
    profile_of: Callable[[m.GenerationRequest], JobProfile]
    max_plan_ms: float | None = None
    checkpoint_every: int = 0
    job_id: re.Pattern[str] = JOB_ID
    keep_ended: int = 10_000  # ended jobs that clients may still ask for
    min_op_deadline_s: float = 30.0  # of a plan, however short it is predicted to be
    artifact_ttl_s: float | None = None
    artifact_quota_bytes: int | None = None


@dataclass(slots=True)
class Rank:
    """What one rank said last."""

    heard_at: float  # or when it was started
    heard: bool = False
    ready: m.Ready | None = None
    inventory: m.Inventory | None = None
    done: int = -1  # number of the last plan acknowledged
    phase_until: float | None = None  # limit of the phase that it reported


@dataclass(slots=True)
class Outstanding:
    """A plan that was sent and is not acknowledged by every rank."""

    plan: m.Plan
    predicted_ms: float
    started_at: float  # sent, or its predecessor's acknowledgement if that came later
    acks: dict[int, m.PlanDone] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Group:
    """One replica: its ranks, its plan stream, the attempts that live in it."""

    id: int
    lane_ms: list[float]
    epoch: int = -1
    world_size: int = 0
    phase: str = "starting"  # "ready", "dead", "given up", or what its ranks report
    settled: bool = False  # adopted under this scheduler epoch: plans may be sent
    unsettled_since: float | None = None
    ranks: dict[int, Rank] = field(default_factory=dict)
    next_number: int = 0
    outstanding: deque[Outstanding] = field(default_factory=deque)
    control: list[m.Op] = field(default_factory=list)  # Drop and Release ops for the next plan
    residents: dict[str, Run] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    budget_known: bool = False
    dying: list[Attempt] = field(default_factory=list)  # attempts whose ranks may still write to slots
    busy_ms: float = 0.0

    @property
    def alive(self) -> bool:
        return self.phase not in ("dead", "given up")

    @property
    def usable(self) -> bool:
        return self.settled and self.alive


@dataclass(slots=True)
class OutputLink:
    """The output process: messages are sent only while it is `ready`; becoming ready sends it everything again."""

    instance: str | None = None
    heard_at: float = 0.0
    ready: bool = False


@dataclass(slots=True)
class State:
    config: CoreConfig
    epoch: int
    now: float = 0.0
    jobs: dict[str, Job] = field(default_factory=dict)  # without a journalled terminal
    ended: dict[str, Ended] = field(default_factory=dict)  # with one, the oldest end first
    stored_bytes: int = 0  # of the artifacts of `ended`
    queue: Queue = field(init=False)
    suspects: deque[Job] = field(default_factory=deque)  # wait for an empty group
    awaiting: dict[int, list[Job]] = field(default_factory=dict)  # may still live in a group of an earlier scheduler
    groups: dict[int, Group] = field(default_factory=dict)
    unsettled: set[int] = field(default_factory=set)  # groups that may write to slots of an earlier scheduler
    output: OutputLink = field(default_factory=OutputLink)
    slots: SlotLedger = field(init=False)
    cost: CostModel = field(default_factory=CostModel)
    peaks: PeakModel = field(default_factory=PeakModel)
    next_seq: int = 0
    draining: bool = False
    drain_until: float = 0.0
    stopped: bool = False  # the grace is over: nothing more is planned
    saving_until: float = 0.0
    saving: set[tuple[str, int]] = field(default_factory=set)  # attempts whose last checkpoint is being written
    leftovers: dict[Attempt, tuple[int, list[str]]] = field(default_factory=dict)  # files that a group may still read
    drained: bool = False
    admit_due: bool = True  # something changed that may let a job enter a group
    actions: list[Action] = field(default_factory=list)
    _timers: list[tuple[float, int, Job]] = field(default_factory=list)
    _waiting: deque[tuple[int, Callable[[], None]]] = field(default_factory=deque)
    _token: int = 0
    _timer_count: int = 0

    def __post_init__(self) -> None:
        self.queue = Queue(self.config.policy)
        self.slots = SlotLedger(self.config.slot_count)
        lanes = len(self.config.policy.lanes)
        self.groups = {g: Group(g, [0.0] * lanes) for g in range(self.config.groups)}

    def to_client(self, identity: bytes, message: m.FromScheduler) -> None:
        self.actions.append(SendClient(identity, message))

    def to_rank(self, group: Group, rank: int, message: m.ToWorker) -> None:
        self.actions.append(SendRank(group.id, rank, group.epoch, message))

    def to_output(self, message: m.ToOutput) -> None:
        """Dropped while output is not ready: it is told everything when it is."""
        if self.output.ready:
            self.actions.append(SendOutput(message))

    def to_supervisor(self, message: m.FromControlled) -> None:
        self.actions.append(SendSupervisor(message))

    def delete_file(self, path: str) -> None:
        self.actions.append(DeleteFile(path))

    def journal(self, record: Record, then: Callable[[], None] | None = None) -> None:
        self._token += 1
        self.actions.append(JournalWrite(self._token, record))
        self._waiting.append((self._token, then or _nothing))

    def committed(self, token: int) -> None:
        while self._waiting and self._waiting[0][0] <= token:
            self._waiting.popleft()[1]()

    @property
    def journal_idle(self) -> bool:
        return not self._waiting

    def wake_at(self, when: float, job: Job) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, job))

    def due(self) -> Job | None:
        """The next job whose timer has passed."""
        if self._timers and self._timers[0][0] <= self.now:
            return heapq.heappop(self._timers)[2]
        return None


def _nothing() -> None:
    return None
