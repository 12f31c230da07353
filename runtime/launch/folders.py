"""The folders of one run: private sockets, state, and what a crashed run left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safelight.runtime.errors import StartupError
from safelight.runtime.messages import Endpoints

_PREFIX = f"safelight-{os.getuid()}-"
INPUTS = "inputs"  # the folder of input pictures in a state folder
_IPC_PATH_LIMIT = 100  # bytes; sockaddr_un holds 108


@dataclass(slots=True)
class RunFolder:
    """A 0700 folder that lives as long as its owner holds `owner.lock`.

    `state` holds journal, artifacts, checkpoints and input pictures: inside the run folder (temporary), or the
    caller's directory.
    """

    root: Path
    state: Path
    slots: Path  # made and locked by the slot pool itself; in shared memory where there is some
    lock: int

    @property
    def journal(self) -> Path:
        return self.state / "journal.sqlite"

    @property
    def artifacts(self) -> Path:
        return self.state / "artifacts"

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    @property
    def marker(self) -> Path:
        """A file by which a rank of another host knows that it sees the same checkpoints."""
        return self.checkpoints / f".{self.root.name}"

    @property
    def inputs(self) -> Path:
        return self.state / INPUTS

    def endpoints(self) -> Endpoints:
        names = ("submit", "plans", "decisions", "chunks", "events", "control")
        return Endpoints(**{name: f"ipc://{self.root / name}.ipc" for name in names})

    def remove(self) -> None:
        """Deletes the run; a state directory of the caller's stays."""
        self.marker.unlink(missing_ok=True)
        shutil.rmtree(self.slots, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)
        os.close(self.lock)


def create_run_folder(state_dir: Path | None) -> RunFolder:
    """Makes the folders of a run and sweeps those of dead owners. Raises StartupError when one cannot be made."""
    base = Path(tempfile.gettempdir())
    shared_base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else base
    _sweep(base)
    try:
        root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = _lock(root)
        run = RunFolder(root, state_dir or root / "state", shared_base / f"{root.name}-slots", lock)
        for made in (run.state, run.artifacts, run.checkpoints, run.inputs):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        run.marker.touch(mode=0o600)
    except OSError as error:
        raise StartupError(f"cannot make the run's folders: {error}; check --state-dir and the free space") from error
    if len(os.fsencode(root / "decisions.ipc")) > _IPC_PATH_LIMIT:
        run.remove()
        raise StartupError(f"socket paths under {root} are too long; set TMPDIR to a shorter path")
    return run


def _lock(root: Path, create: int = os.O_CREAT) -> int:
    handle = os.open(root / "owner.lock", create | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _sweep(base: Path) -> None:
    """Removes run folders whose owner is dead: their lock can be taken. One without a lock is just being made."""
    for found in base.glob(_PREFIX + "*"):
        try:
            handle = _lock(found, create=0)
        except OSError:
            continue
        shutil.rmtree(found, ignore_errors=True)
        os.close(handle)
