"""Child processes: torch-free ones by `subprocess`, ranks by a forkserver that has imported torch already."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import msgspec

from safelight.runtime.errors import WorkerLost
from safelight.runtime.launch.child import frame_spec
from safelight.runtime.launch.joining import JoinedRank
from safelight.runtime.launch.rank import run_rank
from safelight.runtime.messages import (
    ErrorInfo,
    FrontendSpec,
    GroupFailed,
    OutputSpec,
    PhaseReport,
    Ready,
    SchedulerSpec,
    WorkerSpec,
)

_STATUS: msgspec.msgpack.Decoder[PhaseReport | Ready | GroupFailed] = msgspec.msgpack.Decoder(
    PhaseReport | Ready | GroupFailed
)
log = logging.getLogger(__name__)
_INFO = msgspec.msgpack.Decoder(ErrorInfo)


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Children started inside inherit blocked SIGINT, SIGTERM and SIGHUP.

    A terminal and a cluster's scheduler signal whole process groups; the answer (drain, cancel, save) is the frontend's
    alone. Children end by a Shutdown message, by their closed pipe, or by SIGKILL.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def process_state(pid: int) -> str:
    """The kernel's state letter of a process ("T" stopped, "Z" zombie), or "X" when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "X"
    return stat.rpartition(")")[2].split()[0]


@dataclass(slots=True)
class Child:
    """A scheduler, output or frontend process. `fd` becomes readable when it ends."""

    role: str
    process: subprocess.Popen[bytes]
    fd: int
    instance: str = ""  # from its first control heartbeat
    identity: bytes = b""
    last_seen: float = 0.0

    def ended_with(self) -> ErrorInfo | None:
        """The error that a child which ended in its start-up reported. Call after its end."""
        assert self.process.stdout is not None
        data = self.process.stdout.read()
        with contextlib.suppress(msgspec.DecodeError):
            return _INFO.decode(data)
        return None

    def kill(self) -> None:
        """Ends it for certain and reaps it."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Releases the pipes and the descriptor of an ended child."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        os.close(self.fd)


def start_child(role: str, spec: SchedulerSpec | OutputSpec | FrontendSpec, now: float) -> Child:
    """Starts `safelight.runtime.launch.child` with its spec on stdin."""
    command = [sys.executable, "-m", "safelight.runtime.launch.child", role]
    inherited = (spec.listen_fd,) if isinstance(spec, FrontendSpec) else ()
    with interrupts_blocked():
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment(), pass_fds=inherited
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died already: its end is seen by the watcher
        process.stdin.write(frame_spec(spec))
        process.stdin.flush()
    return Child(role, process, os.pidfd_open(process.pid), last_seen=now)


def child_environment() -> dict[str, str]:
    """This environment, able to import this very package from any working directory."""
    import safelight

    source = str(Path(next(iter(safelight.__path__))).parent)
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{path}" if path else source}


@dataclass(slots=True)
class Rank:
    """One rank's process and the pipe that tells its status; closing the pipe ends the rank."""

    process: ForkServerProcess
    status: Connection
    ready: bool = False

    @property
    def pid(self) -> int:
        pid = self.process.pid
        if pid is None:
            raise WorkerLost("the rank's process was never started")
        return pid

    def descriptors(self) -> tuple[int, ...]:
        """Readable when the rank has said something, or has ended."""
        return self.process.sentinel, self.status.fileno()

    def ended(self, ready: set[int]) -> str | None:
        """How it ended, if one of the descriptors that are ready says so."""
        return f"ended with {self.process.exitcode}" if self.process.sentinel in ready else None

    def state(self) -> str:
        return process_state(self.pid)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # by pid: also when the forkserver died and told of no end
            os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> None:
        self.process.join()
        self.status.close()
        self.process.close()

    def messages(self) -> Iterator[PhaseReport | Ready | GroupFailed]:
        """Status messages that wait in the pipe."""
        with contextlib.suppress(EOFError, OSError):
            while self.status.poll(0):
                yield _STATUS.decode(self.status.recv_bytes())


@dataclass(slots=True)
class Group:
    """The ranks of one worker group in its current epoch."""

    number: int
    epoch: int = 0
    ranks: list[Rank | JoinedRank] = field(default_factory=list)
    failed_starts: int = 0
    given_up: ErrorInfo | None = None
    error: ErrorInfo | None = None  # what a rank of this epoch reported
    phase: str = "starting"

    @property
    def ready(self) -> bool:
        return bool(self.ranks) and all(rank.ready for rank in self.ranks)

    def kill(self) -> None:
        """Ends all ranks for certain and reaps them."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.reap()
        self.ranks = []


class RankStarter:
    """Owns the forkserver. Its first use imports torch there; later ranks start in tens of milliseconds."""

    def __init__(self, preload: Sequence[str]) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._preload = list(preload)
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Starts the forkserver and its imports without waiting for them."""
        from multiprocessing import forkserver, resource_tracker

        resource_tracker.ensure_running()  # first: starting it unblocks the signals that the forkserver must inherit
        with self._lock, interrupts_blocked():
            self._context.set_forkserver_preload(self._preload)
            os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a CUDA query before the fork breaks children
            forkserver.ensure_running()

    def start(self, spec: WorkerSpec) -> Rank:
        """Forks one rank, with a new forkserver if the old one died. Raises WorkerLost."""
        for _ in range(2):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=run_rank, args=(msgspec.msgpack.encode(spec), theirs), name=f"rank-{spec.group}-{spec.rank}"
            )
            try:
                with self._lock, interrupts_blocked():
                    process.start()
                return Rank(process, ours)
            except (EOFError, OSError) as error:
                log.warning("the forkserver did not answer: %s", error)
                ours.close()
            finally:
                theirs.close()
        raise WorkerLost(f"rank {spec.rank} of group {spec.group} could not be started: no forkserver answers")
