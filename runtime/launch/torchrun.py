"""One rank that torchrun started: it joins a server, or the one that it starts itself on the node of rank 0.

Started for a server elsewhere, a rank needs the server's address and keys only. Started with a command (`generate`),
rank 0 starts that command once, as a process of its own session that outlives restarts of the ranks and ends with the
agent (the torchrun process). Where it is, and how it ended, goes through torchrun's store; keys never do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import msgspec
from msgspec import structs

import safelight
from safelight.configs.env import TorchrunRank
from safelight.configs.worker_args import WorkerArgs
from safelight.runtime.launch.devices import host_id, resolve_device, usable_cores
from safelight.runtime.launch.membership import Membership
from safelight.runtime.launch.processes import child_environment
from safelight.runtime.messages import Join, Leave, Welcome, WorkerSpec

_FRONTEND, _EXIT = "frontend", "exit"
EXIT_FILE = "exit-code"
_POLL_S = 0.1
_LAST_S = 60.0  # of the command, once it has told the ranks to leave
_END_S = 5.0  # of the command's process, once it has told its exit code
log = logging.getLogger(__name__)


class Store(Protocol):
    """What of torchrun's store is used here."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class Frontend(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one command of a torchrun job, on the host that started it."""

    endpoint: str
    host: str
    pid: int
    folder: str


class Resolve(Protocol):
    """Finds the directory of a model on this host, as `runtime.hub` does."""

    def __call__(self, text: str | None, *, code: bool) -> Path: ...


Launch = Callable[[Path], tuple[str, Sequence[str]]]  # a private folder -> where ranks join, and the command's argv


class Ended(Exception):
    """The command of this torchrun job has ended."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def open_store() -> Store:
    """torchrun's store. Imports torch."""
    from safelight.runtime.worker.torch_store import torchrun_store

    store: Store = torchrun_store()
    return store


def serve(args: WorkerArgs, place: TorchrunRank, resolve: Resolve) -> NoReturn:
    """Works as this rank for the server at `args.endpoint` until told to leave. Raises SafelightError before that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def ended(leave: Leave | None) -> None:
        os._exit(0 if leave is not None and not leave.failed else 1)

    _serve(args, place, resolve, open_store(), ended, lambda: None)


def serve_command(
    launch: Launch,
    args: Callable[[str], WorkerArgs],
    place: TorchrunRank,
    resolve: Resolve,
) -> NoReturn:
    """Works for the command that runs beside rank 0, and ends with its exit code. Raises SafelightError."""
    if place.rank == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the command answers it, then all ranks end
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    store, interrupted = open_store(), threading.Event()

    def given_up() -> None:
        if store.check([_EXIT]):
            raise Ended(int(store.get(_EXIT)))

    def ended(leave: Leave | None) -> None:
        code = 1
        if place.rank == 0 and (interrupted.is_set() or (leave is not None and not leave.failed)):
            time.sleep(_LAST_S)  # the thread that follows the command ends this process
        elif leave is not None and not leave.failed:
            with contextlib.suppress(RuntimeError):  # the store's end: torchrun is gone on the first node
                code = int(store.get(_EXIT))
        os._exit(code)

    try:
        given_up()
        if place.rank == 0:
            frontend = _frontend(store, launch)
            threading.Thread(target=_follow, args=(frontend, interrupted), name="frontend", daemon=True).start()
        frontend = msgspec.json.decode(store.get(_FRONTEND), type=Frontend)
        _serve(args(frontend.endpoint), place, resolve, store, ended, given_up)
    except Ended as end:
        os._exit(end.code)


def _serve(
    args: WorkerArgs,
    place: TorchrunRank,
    resolve: Resolve,
    store: Store,
    ended: Callable[[Leave | None], None],
    given_up: Callable[[], None],
) -> NoReturn:
    join = Join(
        instance=secrets.token_hex(8),
        run=place.run,
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        device=resolve_device(args.device, place.local_world_size),
        version=safelight.__version__,
        waiting=True,
    )
    membership = Membership(args.endpoint, args.keys, join, ended)
    welcome = membership.welcome(args.join_timeout_s, given_up)
    spec = _completed(welcome, args, join, resolve(welcome.model, code=welcome.spec.trust_remote_code))
    spec = _with_checkpoints(spec, welcome, store)
    from safelight.runtime.worker import main as worker

    worker.run(spec, membership.tell)


def _completed(welcome: Welcome, args: WorkerArgs, join: Join, model: Path) -> WorkerSpec:
    """The specification with what only this host knows."""
    same_host = welcome.host == host_id() and _sees_slots(welcome.spec)
    if not same_host:
        log.info("the server's shared memory is not here: frames travel with their messages")
    threads = max(1, usable_cores() // (2 * join.local_world_size)) if join.device == "cpu" else 1
    return structs.replace(
        welcome.spec,
        model_path=str(model),
        slots=welcome.spec.slots if same_host else None,
        num_threads=threads,
        keys=args.keys,
        interface=args.interface or welcome.spec.interface,
        log_level=args.log_level,
    )


def _sees_slots(spec: WorkerSpec) -> bool:
    return spec.slots is not None and (Path(spec.slots.folder) / "slot-0").is_file()


def _with_checkpoints(spec: WorkerSpec, welcome: Welcome, store: Store) -> WorkerSpec:
    """Without the checkpoint folder, on all ranks of a group, unless all of them see the server's."""
    prefix = spec.store.removeprefix("env://")
    mine = (Path(spec.checkpoint_dir) / welcome.marker).is_file()
    store.set(f"{prefix}/checkpoints/{spec.rank}", "1" if mine else "0")
    blind = [r for r in range(spec.world_size) if store.get(f"{prefix}/checkpoints/{r}") != b"1"]
    if not blind:
        return spec
    if spec.rank == 0:
        log.warning(
            "no checkpoints: ranks %s do not see %s; share --state-dir between the nodes", blind, spec.checkpoint_dir
        )
    return structs.replace(spec, checkpoint_dir="")


# ---- the command beside rank 0


def _frontend(store: Store, launch: Launch) -> Frontend:
    """The job's command: the one of an earlier round, or a new one. A folder of its own tells how it ended."""
    if store.check([_FRONTEND]):
        return msgspec.json.decode(store.get(_FRONTEND), type=Frontend)
    folder = Path(tempfile.mkdtemp(prefix=f"safelight-{os.getuid()}-torchrun-"))
    endpoint, command = launch(folder)
    argv = ["-m", "safelight.entrypoints.frontend", str(folder), str(os.getppid()), *command]
    process = subprocess.Popen(
        [sys.executable, *argv], stdin=subprocess.DEVNULL, env=child_environment(), start_new_session=True
    )
    frontend = Frontend(endpoint, host_id(), process.pid, str(folder))
    store.set(_FRONTEND, msgspec.json.encode(frontend).decode())
    return frontend


def _follow(frontend: Frontend, interrupted: threading.Event) -> None:
    """Waits for the command's end, tells all ranks its exit code, and ends this rank with it."""
    store = open_store()  # of this thread: a connection that waits for a key does nothing else
    folder = Path(frontend.folder)
    process = _open_process(frontend)
    if process is not None:
        threading.Thread(target=_forward_interrupts, args=(process, interrupted), daemon=True).start()
        while not (folder / EXIT_FILE).exists() and not select.select([process], [], [], _POLL_S)[0]:
            pass
    try:
        code = int((folder / EXIT_FILE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        code = 1  # killed
    store.set(_EXIT, str(code))
    shutil.rmtree(folder, ignore_errors=True)
    if process is not None:
        select.select([process], [], [], _END_S)
    os._exit(code)


def _forward_interrupts(process: int, interrupted: threading.Event) -> None:
    """Ctrl-C: the agent waits for this rank, and this rank for the command. (SIGTERM may be a restart of the ranks.)"""
    while True:
        signal.sigwait({signal.SIGINT})
        interrupted.set()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGINT)


def _open_process(frontend: Frontend) -> int | None:
    """A descriptor of the command's process, unless that has ended."""
    try:
        handle = os.pidfd_open(frontend.pid)
        while not (line := _command_line(frontend.pid)):  # it is being executed, and not set up yet; or it has ended
            if select.select([handle], [], [], _POLL_S)[0]:
                break
    except OSError:
        return None
    if os.fsencode(frontend.folder) in line.split(b"\0"):
        return handle
    os.close(handle)
    return None


def _command_line(pid: int) -> bytes:
    """Empty for a process that has ended, and for one within exec: its parent may go on before it has arguments."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()
