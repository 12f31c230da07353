"""Starts scheduler, output, frontend and worker groups, watches them, starts again what died. Holds no job state."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from safelight.configs.families import FAMILIES, identify
from safelight.configs.server_args import ServerArgs
from safelight.runtime import slots, transport
from safelight.runtime.errors import ConfigError, ModelError, StartupError, UnsupportedModel, from_code
from safelight.runtime.inputs import InputStore
from safelight.runtime.launch import specs
from safelight.runtime.launch.children import MAX_FAILED_STARTS, Children
from safelight.runtime.launch.devices import resolve_device
from safelight.runtime.launch.folders import RunFolder, create_run_folder
from safelight.runtime.launch.joining import JoinDesk, JoinedRank
from safelight.runtime.launch.processes import Group, Rank, RankStarter
from safelight.runtime.messages import (
    ControlHeartbeat,
    Drain,
    Drained,
    Endpoints,
    ErrorInfo,
    FromControlled,
    FrontendSpec,
    GroupFailed,
    GroupGivenUp,
    GroupStarting,
    KillGroup,
    OutputSpec,
    PhaseReport,
    RankExited,
    RankSilent,
    Ready,
    SchedulerSpec,
    SlotPool,
    ToControlled,
)

DRAIN_SAVING_S = 120.0  # after the grace detached jobs are saved, which takes as long as the steps under way
_FINAL_ERRORS = (ConfigError.code, ModelError.code, UnsupportedModel.code)  # trying again cannot help
log = logging.getLogger(__name__)


class Supervisor:
    """One running server: `with Supervisor(args, model_root, slot_bytes) as server: ...`.

    `start` returns as soon as the processes are started; `wait_ready` until every group can run a job. A thread watches
    and restarts. `failure` is set when the server cannot go on. `frontend` makes the specification of a frontend
    process, for a server that has one.
    """

    def __init__(
        self,
        args: ServerArgs,
        model_root: Path,
        slot_bytes: int,
        frontend: Callable[[Endpoints], FrontendSpec] | None = None,
    ) -> None:
        self._args = args
        self._model_root = model_root
        self._slot_bytes = slot_bytes
        joining = args.worker_endpoint is not None  # the ranks, wherever they are, know their devices
        self._device = args.device if joining else resolve_device(args.device, args.num_gpus)
        spec = identify(model_root, args.backend, args.trust_remote_code)
        pipeline = FAMILIES[spec.family].pipeline
        self._starter = RankStarter(["safelight.runtime.worker.main", pipeline.partition(":")[0]])
        self._groups = [Group(number) for number in range(args.replicas)]
        self._children: Children | None = None
        self._frontend = frontend
        self._roles = ("scheduler", "output", "frontend") if frontend else ("scheduler", "output")
        self._run_folder: RunFolder | None = None
        self._pool: SlotPool | None = None
        self._context: zmq.Context[Any] = zmq.Context()
        self._control: transport.Channel[FromControlled] | None = None
        self._desk: JoinDesk | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._changed = threading.Condition()
        self._stopping = False
        self._drain_until: float | None = None
        self._drain_told = False
        self._drained = False
        self._thread: threading.Thread | None = None
        self.failure: StartupError | None = None

    # ---- the caller's side

    def start(self) -> Supervisor:
        """Makes folders and slots and starts all processes. Raises StartupError; then nothing is left behind."""
        joining = self._args.worker_endpoint
        if joining is None:
            self._starter.warm()
        self._run_folder = create_run_folder(Path(self._args.state_dir) if self._args.state_dir else None)
        try:
            self._pool = slots.create_pool(self._run_folder.slots, self._args.frame_slots, self._slot_bytes)
            self._control = transport.bind_router(self._context, self.endpoints.control, FromControlled)
            if joining is not None:
                self._desk = JoinDesk(self._context, joining, self._args.keys, self._args.num_gpus, self._device)
            self._children = Children(self._roles, self._child_spec, self._control)
            self._children.start()
            for group in self._groups:
                self._start_group(group)
        except BaseException:
            self._teardown()
            raise
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()
        return self

    @property
    def endpoints(self) -> Endpoints:
        assert self._run_folder is not None, "started"
        return self._run_folder.endpoints()

    @property
    def state_folder(self) -> Path:
        """Of the journal and the artifacts; a temporary one unless --state-dir names it."""
        assert self._run_folder is not None, "started"
        return self._run_folder.state

    @property
    def inputs(self) -> InputStore:
        """Where the pictures of requests go before they are submitted."""
        assert self._run_folder is not None, "started"
        return InputStore(self._run_folder.inputs)

    def wait_ready(self, timeout: float, on_phase: Callable[[str], None] | None = None) -> None:
        """Returns when every group is ready or given up (one is ready then).

        Raises StartupError: all given up, or not ready after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        told = ""
        while True:
            with self._changed:
                phases = {group.phase for group in self._groups}
                if self.failure:
                    raise self.failure
                if all(group.ready or group.given_up for group in self._groups):
                    return
                phase = ", ".join(sorted(phases))
                if phase == told:
                    self._changed.wait(min(1.0, max(0.0, deadline - time.monotonic())))
            if phase != told and on_phase:
                on_phase(phase)
            told = phase
            if time.monotonic() > deadline:
                raise StartupError(f"not ready after {timeout:.0f} s, still {told}; raise --startup-timeout-s")

    def wait(self, timeout_s: float) -> None:
        """Returns after `timeout_s`, or earlier when something happened."""
        with self._changed:
            if self.failure is None:
                self._changed.wait(timeout_s)

    def fail(self, error: StartupError) -> None:
        """The caller knows that the server cannot go on."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def pids(self) -> dict[str, int]:
        """Ids of our processes by role ("scheduler", "output", "worker 0.0", ...), for people and for tests."""
        with self._changed:
            found = self._children.pids() if self._children else {}
            for group in self._groups:
                ours = (rank for rank in group.ranks if isinstance(rank, Rank))
                found |= {f"worker {group.number}.{i}": rank.pid for i, rank in enumerate(ours)}
            return found

    def begin_drain(self, grace_s: float) -> None:
        """Accepts nothing new; what runs may finish within the grace. A second call sets another grace."""
        with self._changed:
            self._drain_until, self._drain_told = time.monotonic() + grace_s, False
        os.eventfd_write(self._wake, 1)

    @property
    def drained(self) -> bool:
        """Whether a drain is over: all has ended, or is saved."""
        return self._drained

    def drain(self, grace_s: float) -> bool:
        """Drains and waits until nothing runs; False when work was left after the grace."""
        self.begin_drain(grace_s)
        with self._changed:
            self._changed.wait_for(lambda: self._drained or self.failure is not None, grace_s + DRAIN_SAVING_S)
            return self._drained

    def stop(self) -> None:
        """Ends all processes and removes the run's folders. Idempotent."""
        if self._thread is not None:
            self._stopping = True
            if self._children:
                self._children.closing = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._thread = None
        self._teardown()

    def __enter__(self) -> Supervisor:
        return self if self._thread else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- the watching thread

    def _watch(self) -> None:
        try:
            while not self._stopping and self.failure is None:
                self._watch_once()
        except Exception as error:  # the main of the supervisor: a silent end would leave the server unwatched
            log.exception("the supervisor ends")
            with self._changed:
                self._fail(f"the supervisor cannot go on: {error}")
                self._changed.notify_all()

    def _watch_once(self) -> None:
        ready = self._poll()
        with self._changed:
            now = time.monotonic()
            assert self._children is not None
            if reason := self._children.watch(ready):
                self._fail(reason)
            if self._desk:
                self._watch_desk(self._desk)
            for group in self._groups:
                self._watch_group(group, ready)
            assert self._control is not None
            for received in self._control.receive_all():
                self._handle(received.identity, received.message, now)
            if reason := self._children.watch_silence(now):
                self._fail(reason)
            if self._drain_until is not None and not self._drain_told:
                self._drain_told = self._tell(Drain(max(0.0, self._drain_until - now)))
            self._changed.notify_all()

    def _poll(self) -> set[int]:
        assert self._control is not None
        poller = zmq.Poller()
        poller.register(self._control.socket, zmq.POLLIN)
        if self._desk:
            poller.register(self._desk.socket, zmq.POLLIN)
        descriptors = [self._wake, *(self._children.descriptors() if self._children else ())]
        for group in self._groups:
            for rank in group.ranks:
                descriptors += rank.descriptors()
        for descriptor in descriptors:
            poller.register(descriptor, zmq.POLLIN)
        found = {key for key, _events in poller.poll(500) if isinstance(key, int)}
        if self._wake in found:
            os.eventfd_read(self._wake)
        return found

    def _handle(self, identity: bytes, message: FromControlled, now: float) -> None:
        match message:
            case ControlHeartbeat(role=role):
                if self._children and self._children.heard(identity, message, now) and role == "scheduler":
                    self._introduce_groups()
            case RankSilent(number, rank, epoch, seconds):
                group = self._group(number, epoch)
                if group and 0 <= rank < len(group.ranks):
                    state = group.ranks[rank].state()
                    if state in "TtZX":
                        self._restart_group(group, f"rank {rank} silent for {seconds:.0f} s, process state {state}")
            case KillGroup(number, epoch, reason):
                if group := self._group(number, epoch):
                    self._restart_group(group, reason)
            case Drained():
                self._drained = True

    def _group(self, number: int, epoch: int) -> Group | None:
        """A running group in this very epoch; what is said of another is late, or nonsense."""
        group = self._groups[number] if 0 <= number < len(self._groups) else None
        return group if group and group.epoch == epoch and group.ranks else None

    def _tell(self, message: ToControlled) -> bool:
        """To the scheduler, whether it was sent; what a new one must know is told at its first heartbeat."""
        return self._children is not None and self._children.tell("scheduler", message)

    def _introduce_groups(self) -> None:
        """What a new scheduler must know: the newest epoch of each group, and that earlier ones are dead."""
        for group in self._groups:
            if group.epoch > 0:
                self._tell(RankExited(group.number, group.epoch - 1, "before this scheduler"))
            self._announce(group)
        self._drain_told = False

    def _announce(self, group: Group) -> None:
        if group.given_up:
            self._tell(GroupGivenUp(group.number, group.given_up))
        else:
            self._tell(GroupStarting(group.number, group.epoch, self._world_size))

    # ---- children

    def _child_spec(self, role: str) -> SchedulerSpec | OutputSpec | FrontendSpec:
        assert self._run_folder is not None
        assert self._pool is not None
        if role == "scheduler":
            return specs.scheduler_spec(self._args, self._run_folder, self._pool, self._model_root, self._world_size)
        if role == "frontend":
            assert self._frontend is not None
            return self._frontend(self.endpoints)
        return specs.output_spec(self._args, self._run_folder, self._pool)

    # ---- groups

    @property
    def _world_size(self) -> int:
        return self._args.group_size

    def _start_group(self, group: Group) -> None:
        assert self._run_folder is not None
        assert self._pool is not None
        group.error, group.phase = None, "starting"
        if self._desk:
            return  # torchrun starts its ranks
        for rank in range(self._world_size):
            spec = specs.worker_spec(
                self._args, self._run_folder, self._pool, self._model_root, self._device, group, rank
            )
            group.ranks.append(self._starter.start(spec))

    def _watch_group(self, group: Group, ready: set[int]) -> None:
        for number, rank in enumerate(group.ranks):
            if self._desk or ready.intersection(rank.descriptors()):
                for message in rank.messages():
                    self._note_status(group, rank, message)
            if (end := rank.ended(ready)) or (self._desk and group.error):
                self._restart_group(group, group.error.message if group.error else f"rank {number} {end}")
                return

    def _watch_desk(self, desk: JoinDesk) -> None:
        """Ranks that torchrun started come and go by rounds of all of them."""
        if (reason := desk.receive()) and (at_work := next((group for group in self._groups if group.ranks), None)):
            self._restart_group(at_work, reason)
        if ranks := desk.begin():
            for group in self._groups:
                self._welcome(group, [ranks[group.number * self._world_size + i] for i in range(self._world_size)])
        for group in self._groups:
            group.phase = group.phase if desk.round else desk.phase
        if desk.idle_s > self._args.startup_timeout_s:
            self._fail(f"{desk.phase}, and that for {desk.idle_s:.0f} s; raise --startup-timeout-s, or start them")

    def _welcome(self, group: Group, ranks: list[JoinedRank]) -> None:
        assert self._run_folder is not None
        assert self._pool is not None
        group.epoch += 1
        group.ranks, group.phase = [*ranks], "starting"
        self._announce(group)
        for number, rank in enumerate(ranks):
            folders = (self._run_folder, self._pool, self._model_root)
            rank.welcome(specs.welcome(self._args, *folders, rank.join, group, number))

    def _note_status(self, group: Group, rank: Any, message: PhaseReport | Ready | GroupFailed) -> None:
        match message:
            case PhaseReport(phase=phase):
                group.phase = phase
            case Ready():
                rank.ready = True
                if group.ready:
                    group.phase, group.failed_starts = "ready", 0
            case GroupFailed(error=error):
                group.error = group.error or error

    def _restart_group(self, group: Group, reason: str) -> None:
        was_ready = group.ready
        log.error("group %d epoch %d ends: %s", group.number, group.epoch, reason)
        group.kill()
        self._tell(RankExited(group.number, group.epoch, reason))
        group.failed_starts = 0 if was_ready else group.failed_starts + 1
        final = group.error is not None and group.error.code in _FINAL_ERRORS and not was_ready
        if self._desk:
            self._desk.end()  # its agent restarts all ranks of torchrun together
        if final or group.failed_starts >= MAX_FAILED_STARTS:
            group.phase = "dead"
            group.given_up = group.error or ErrorInfo(StartupError.code, reason)
            self._announce(group)
            if self._desk or all(other.given_up for other in self._groups):
                self._fail(group.given_up.message, group.given_up)
            return
        group.epoch += 1
        self._start_group(group)
        self._announce(group)
        if self._desk and (other := next((other for other in self._groups if other.ranks), None)):
            self._restart_group(other, reason)

    # ---- the end

    def _fail(self, message: str, info: ErrorInfo | None = None) -> None:
        error = StartupError(message)
        if info and info.code in _FINAL_ERRORS:
            error.__cause__ = from_code(info.code, info.message, info.param)
        self.failure = error

    def _teardown(self) -> None:
        if self._children:
            self._children.stop_frontend()
            self._children.say_shutdown()
        if self._desk:
            self._desk.dismiss()
            self._desk = None
            for group in self._groups:
                group.ranks = []
        for group in self._groups:
            group.kill()
        if self._children:
            self._children.end()
            self._children = None
        if self._control:
            self._control.close()
            self._control = None
        self._context.destroy(linger=100)
        if self._run_folder:
            self._run_folder.remove()
            self._run_folder = None
