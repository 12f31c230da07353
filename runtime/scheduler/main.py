"""The scheduler process: sockets, clock and journal around the core. Never imports torch, never waits for a worker."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import time
from collections import deque
from pathlib import Path

import zmq

from safelight.configs.families import FAMILIES, check_images, identify
from safelight.configs.profile import JobProfile
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime import curve, transport
from safelight.runtime import messages as m
from safelight.runtime.errors import InvalidRequest, StartupError
from safelight.runtime.inputs import InputStore, check_ref
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
from safelight.runtime.scheduler.journal import Journal
from safelight.runtime.scheduler.state import CoreConfig
from safelight.runtime.transport import Channel, PeerUnreachable

TICK_S = 1.0
SWEEP_S = 600.0  # between looks for input pictures that no job needs any more
log = logging.getLogger("safelight.scheduler")


def main(spec: m.SchedulerSpec, parent_fd: int | None = None) -> None:
    """Runs until the supervisor says Shutdown or the other end of `parent_fd` closes.

    Raises StartupError, ConfigError and ModelError before it serves.
    """
    config = CoreConfig(
        groups=spec.groups,
        policy=policy.by_name(spec.policy),
        slot_count=spec.slots.count,
        slot_bytes=spec.slots.slot_bytes,
        max_queue=spec.max_queue,
        profile_of=Profiler(Path(spec.model_path), spec.backend, spec.trust_remote_code).profile_of,
        max_plan_ms=spec.max_plan_ms,
        checkpoint_every=spec.checkpoint_every,
        min_op_deadline_s=spec.min_op_deadline_s,
        artifact_ttl_s=spec.artifact_ttl_s,
        artifact_quota_bytes=spec.artifact_quota_bytes,
    )
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, wake_read)
        stack.callback(os.close, wake_write)
        journal = Journal(Path(spec.journal), lambda: _wake(wake_write))
        stack.callback(journal.close)
        open_jobs = {history.submit.job for history in journal.recovered.histories if history.terminal is None}
        _sweep_checkpoints(Path(spec.checkpoint_dir), open_jobs)
        inputs = InputStore(Path(spec.input_dir)) if spec.input_dir else None
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.term)
        keys = curve.server_keys(Path(spec.keys)) if spec.keys else None
        if keys is not None:
            stack.enter_context(curve.Gatekeeper(context, keys.allowed))
        loop = Loop(context, spec.endpoints, stack, journal, config, keys, inputs)
        loop.run(wake_read, parent_fd)


def _sweep_checkpoints(folder: Path, open_jobs: set[str]) -> None:
    """Deletes the files of jobs that have ended, half-written ones too: `<job>-...` or `.<job>-...`."""
    for path in folder.glob("*.safetensors*"):
        if path.name.lstrip(".").partition("-")[0] not in open_jobs:
            path.unlink(missing_ok=True)


class Profiler:
    """Validates requests against one model directory and profiles them. Raises ModelError for a bad directory."""

    def __init__(self, root: Path, backend: str = "auto", trust_remote_code: bool = False) -> None:
        self._spec = identify(root, backend, trust_remote_code)
        self._family = FAMILIES[self._spec.family]

    def profile_of(self, request: m.GenerationRequest) -> JobProfile:
        """Raises InvalidRequest naming the parameter."""
        params = SamplingParams.of(request)
        check_images(self._spec, len(request.images))
        for image in request.images:
            check_ref(image)
        self._family.validate(self._spec, params)
        _check_media(request)
        return self._family.profile(self._spec, params)


def _check_media(request: m.GenerationRequest) -> None:
    """Raises InvalidRequest for a format that cannot hold the frames, or a quality that is none."""
    media, still = request.media, (m.MediaFormat.PNG, m.MediaFormat.JPEG)
    if media.format in still and request.num_frames > 1:
        raise InvalidRequest(
            f"{media.format.value} holds one picture, not {request.num_frames} frames; use mp4, or ask for one frame",
            param="format",
        )
    if media.quality is not None and not 0 <= media.quality <= 100:
        raise InvalidRequest(f"quality is 0 to 100, got {media.quality}", param="quality")


class Loop:
    """Polls the four links and the journal, feeds the core, carries out its actions."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: m.Endpoints,
        stack: contextlib.ExitStack,
        journal: Journal,
        config: CoreConfig,
        keys: curve.CurveKeys | None = None,
        inputs: InputStore | None = None,
    ) -> None:
        self._clock_offset = time.time() - time.monotonic()
        self._submit: Channel[m.ToScheduler] = stack.enter_context(
            transport.bind_router(context, endpoints.submit, m.ToScheduler)
        )
        self._plans: Channel[m.FromWorker] = stack.enter_context(
            transport.bind_router(context, endpoints.plans, m.FromWorker, keys)
        )
        self._decisions: Channel[m.FromOutput] = stack.enter_context(
            transport.bind_router(context, endpoints.decisions, m.FromOutput)
        )
        self._control: Channel[m.ToControlled] = stack.enter_context(
            transport.connect_dealer(context, endpoints.control, m.ToControlled, transport.SCHEDULER_IDENTITY)
        )
        self._journal, self._inputs = journal, inputs
        self._next_sweep = 0.0
        self._instance = secrets.token_hex(8)
        self._refused = 0
        self._warned_of_checkpoints = False
        recovered = journal.recovered
        self._core = SchedulerCore(config, recovered.scheduler_epoch, recovered.histories, self.now())
        log.info("epoch %d, %d jobs recovered", recovered.scheduler_epoch, len(recovered.histories))

    def now(self) -> float:
        """Seconds since 1970 that never run backwards within this process."""
        return time.monotonic() + self._clock_offset

    def run(self, wake_read: int, parent_fd: int | None) -> None:
        """Returns at Shutdown, at the parent's end; raises StartupError when the journal cannot be written."""
        poller = zmq.Poller()
        for channel in (self._submit, self._plans, self._decisions, self._control):
            poller.register(channel.socket, zmq.POLLIN)
        for fd in (wake_read, parent_fd):
            if fd is not None:
                poller.register(fd, zmq.POLLIN)
        next_tick = 0.0
        while True:
            ready = dict(poller.poll(max(0, math.ceil((next_tick - time.monotonic()) * 1000))))
            if parent_fd in ready:
                return
            if wake_read in ready:
                os.read(wake_read, 4096)
                self._committed()
            if self._receive():
                return
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK_S
                self._beat()
                self._feed(Tick())
                self._sweep_inputs()

    def _receive(self) -> bool:
        """Everything that waits on the links; True at Shutdown."""
        for control in self._control.receive_all():
            if isinstance(control.message, m.Shutdown):
                return True
            self._feed(SupervisorSaid(control.message))
        for ranks in self._plans.receive_all():
            self._feed(RankSaid(self._checked(ranks.message)))
        for output in self._decisions.receive_all():
            if output.identity == transport.OUTPUT_IDENTITY:
                self._feed(OutputSaid(output.message))
        for client in self._submit.receive_all():
            self._feed(ClientSaid(client.identity, client.message))
        return False

    def _checked(self, message: m.FromWorker) -> m.FromWorker:
        """A checkpoint counts when this process sees its file, as all who may resume from it must. The first that is
        none is warned of: later deaths of a group cost more than they need to."""
        if isinstance(message, m.CheckpointCommitted) and not Path(message.ref.path).is_file():
            reason = (
                f"checkpoint {message.ref.path} was written on another host and is not here; let --state-dir name a "
                "folder on a file system that all nodes share"
            )
            place = (message.group, message.group_epoch, message.job, message.attempt, message.index)
            message = m.CheckpointFailed(*place, m.ErrorInfo(StartupError.code, reason))
        if isinstance(message, m.CheckpointFailed) and not self._warned_of_checkpoints:
            self._warned_of_checkpoints = True
            log.warning("job %s has no checkpoint: %s", message.job, message.error.message)
        return message

    def _committed(self) -> None:
        if self._journal.failure is not None:
            raise StartupError(f"the journal cannot be written: {self._journal.failure}; is the disk full?")
        self._feed(JournalCommitted(self._journal.committed))

    def _beat(self) -> None:
        with contextlib.suppress(PeerUnreachable):
            self._control.send(m.ControlHeartbeat("scheduler", self._instance, os.getpid()))
        refused = sum(c.refused for c in (self._submit, self._plans, self._decisions, self._control))
        if refused > self._refused:
            log.warning("%d malformed messages dropped", refused - self._refused)
            self._refused = refused

    def _sweep_inputs(self) -> None:
        """Deletes pictures of jobs that have ended."""
        if self._inputs is not None and time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_S
            self._inputs.sweep(image for job in self._core.state.jobs.values() for image in job.request.images)

    def _feed(self, event: CoreEvent) -> None:
        """Handles an event and the failures of the sends that follow from it."""
        events: deque[CoreEvent] = deque([event])
        while events:
            for action in self._core.handle(events.popleft(), self.now()):
                try:
                    self._carry_out(action)
                except PeerUnreachable as error:
                    if isinstance(action, SendRank):
                        log.warning("plan link: %s", error)
                        events.append(RankUnreachable(action.group, action.rank, action.group_epoch))
                    elif isinstance(action, SendOutput):
                        events.append(OutputUnreachable())

    def _carry_out(self, action: Action) -> None:
        """Raises PeerUnreachable."""
        if isinstance(action, SendRank):
            identity = transport.worker_identity(action.group, action.rank, action.group_epoch)
            self._plans.send(action.message, identity)
        elif isinstance(action, SendOutput):
            self._decisions.send(action.message, transport.OUTPUT_IDENTITY)
        elif isinstance(action, SendClient):
            self._submit.send(action.message, action.identity)
        elif isinstance(action, JournalWrite):
            self._journal.write(action.token, action.record)
        elif isinstance(action, DeleteFile):
            Path(action.path).unlink(missing_ok=True)
        elif isinstance(action, SendSupervisor):
            if isinstance(action.message, m.KillGroup):
                log.warning("group %d: %s", action.message.group, action.message.reason)
            self._control.send(action.message)


def _wake(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
        os.write(fd, b".")
