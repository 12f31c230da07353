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
_IPC_PATH_LIMIT = 100  # bytes; sockaddr_un holds 108


@dataclass(slots=True)
class RunFolder:
    """A 0700 folder that lives as long as its owner holds `owner.lock`.

    `state` holds journal, artifacts and checkpoints: inside the run folder (temporary), or the caller's directory.
    """

    root: Path
    state: Path
    shared: Path  # frame slots, in shared memory where there is some
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

    def endpoints(self) -> Endpoints:
        names = ("submit", "plans", "decisions", "chunks", "events", "control")
        return Endpoints(**{name: f"ipc://{self.root / name}.ipc" for name in names})

    def remove(self) -> None:
        """Deletes the run; a state directory of the caller's stays."""
        shutil.rmtree(self.shared, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)
        os.close(self.lock)


def create_run_folder(state_dir: Path | None) -> RunFolder:
    """Makes the folders of a run and sweeps those of dead owners. Raises StartupError when one cannot be made."""
    base = Path(tempfile.gettempdir())
    shared_base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else base
    for folder in {base, shared_base}:
        _sweep(folder)
    try:
        root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = _lock(root)
        shared = root / "slots" if shared_base == base else shared_base / root.name
        run = RunFolder(root, state_dir or root / "state", shared, lock)
        for made in (run.state, run.artifacts, run.checkpoints, run.shared):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
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
    """Removes run folders whose owner is dead. Slot folders in shared memory are named like their run folder."""
    for found in base.glob(_PREFIX + "*"):
        owner = Path(tempfile.gettempdir()) / found.name
        try:
            handle = _lock(owner, create=0)
        except OSError:
            # Held by its living owner, or not locked yet by one that is just starting, or slots without a run.
            if not owner.exists():
                shutil.rmtree(found, ignore_errors=True)
            continue
        shutil.rmtree(found, ignore_errors=True)
        os.close(handle)
