"""Starts scheduler, output, frontend and worker groups and watches over them. Holds no job state."""

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
from safelight.runtime.errors import StartupError
from safelight.runtime.inputs import InputStore
from safelight.runtime.launch import specs
from safelight.runtime.launch.children import Children
from safelight.runtime.launch.devices import resolve_device
from safelight.runtime.launch.folders import RunFolder, create_run_folder
from safelight.runtime.launch.groups import WorkerGroups
from safelight.runtime.launch.processes import Group, RankStarter
from safelight.runtime.messages import (
    ControlHeartbeat,
    Drain,
    Drained,
    Endpoints,
    FromControlled,
    FrontendSpec,
    Join,
    KillGroup,
    OutputSpec,
    RankSilent,
    SchedulerSpec,
    SlotPool,
    ToControlled,
    Welcome,
    WorkerSpec,
)

DRAIN_SAVING_S = 120.0  # after the grace detached jobs are saved, which takes as long as the steps under way
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
        starter = RankStarter(["safelight.runtime.worker.main", FAMILIES[spec.family].pipeline.partition(":")[0]])
        self._groups = WorkerGroups(args, starter, self._rank_spec, self._welcome, self._tell)
        self._children: Children | None = None
        self._frontend = frontend
        self._roles = ("scheduler", "output", "frontend") if frontend else ("scheduler", "output")
        self._run_folder: RunFolder | None = None
        self._pool: SlotPool | None = None
        self._context: zmq.Context[Any] = zmq.Context()
        self._control: transport.Channel[FromControlled] | None = None
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
        self._groups.warm()
        self._run_folder = create_run_folder(Path(self._args.state_dir) if self._args.state_dir else None)
        try:
            self._pool = slots.create_pool(self._run_folder.slots, self._args.frame_slots, self._slot_bytes)
            self._control = transport.bind_router(self._context, self.endpoints.control, FromControlled)
            self._children = Children(self._roles, self._child_spec, self._control)
            self._children.start()
            self._groups.start(self._context, self._device)
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
                if self.failure:
                    raise self.failure
                if self._groups.settled:
                    return
                phase = self._groups.phase
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
            return (self._children.pids() if self._children else {}) | self._groups.pids()

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
                self.failure = StartupError(f"the supervisor cannot go on: {error}")
                self._changed.notify_all()

    def _watch_once(self) -> None:
        ready = self._poll()
        with self._changed:
            now = time.monotonic()
            assert self._children is not None
            ended = self._children.watch(ready)
            self._groups.watch(ready)
            assert self._control is not None
            for received in self._control.receive_all():
                self._handle(received.identity, received.message, now)
            if reason := ended or self._children.watch_silence(now):
                self.failure = StartupError(reason)
            self.failure = self.failure or self._groups.failure
            if self._drain_until is not None and not self._drain_told:
                self._drain_told = self._tell(Drain(max(0.0, self._drain_until - now)))
            self._changed.notify_all()

    def _poll(self) -> set[int]:
        assert self._control is not None
        poller = zmq.Poller()
        poller.register(self._control.socket, zmq.POLLIN)
        if desk := self._groups.socket:
            poller.register(desk, zmq.POLLIN)
        descriptors = [self._wake, *(self._children.descriptors() if self._children else ())]
        descriptors += self._groups.descriptors()
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
                    self._groups.introduce()
                    self._drain_told = False
            case RankSilent() | KillGroup():
                self._groups.complaint(message)
            case Drained():
                self._drained = True

    def _tell(self, message: ToControlled) -> bool:
        """To the scheduler, whether it was sent; what a new one must know is told at its first heartbeat."""
        return self._children is not None and self._children.tell("scheduler", message)

    # ---- what each process is told at its start

    def _child_spec(self, role: str) -> SchedulerSpec | OutputSpec | FrontendSpec:
        assert self._run_folder is not None
        assert self._pool is not None
        if role == "scheduler":
            return specs.scheduler_spec(self._args, self._run_folder, self._pool, self._model_root)
        if role == "frontend":
            assert self._frontend is not None
            return self._frontend(self.endpoints)
        return specs.output_spec(self._args, self._run_folder, self._pool)

    def _rank_spec(self, group: Group, rank: int) -> WorkerSpec:
        assert self._run_folder is not None
        assert self._pool is not None
        return specs.worker_spec(self._args, self._run_folder, self._pool, self._model_root, self._device, group, rank)

    def _welcome(self, group: Group, rank: int, join: Join) -> Welcome:
        assert self._run_folder is not None
        assert self._pool is not None
        return specs.welcome(self._args, self._run_folder, self._pool, self._model_root, join, group, rank)

    # ---- the end

    def _teardown(self) -> None:
        if self._children:
            self._children.stop_frontend()
            self._children.say_shutdown()
        self._groups.end()
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
