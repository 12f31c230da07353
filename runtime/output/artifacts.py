"""Finished and unfinished files in the artifact folder.

A file is written under a hidden temporary name in the same folder, synced, and then renamed: a name without a leading
dot is always a whole file. The writer holds an flock on its temporary file, so that the sweep of another server that
shares the folder leaves it alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safelight.runtime.errors import ProtocolError, StartupError

PARTIAL_SUFFIX = ".partial"
_JOB = re.compile(r"[0-9A-Za-z]{26}")
_FINISHED = re.compile(rf"({_JOB.pattern})-\d+-\d+\.")


@dataclass(frozen=True, slots=True)
class Seal:
    """What is known of a complete, synced file."""

    nbytes: int
    sha256: str


class Partial:
    """A file being written. Raises OSError."""

    def __init__(self, final: Path, take: int) -> None:
        self.final = final
        self.path = final.with_name(f".{final.name}.{take}{PARTIAL_SUFFIX}")
        self._descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def seal(self) -> Seal:
        """Call after the encoder has finished: the content is on the disk when this returns."""
        os.fsync(self._descriptor)
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Seal(os.fstat(self._descriptor).st_size, digest)

    def publish(self) -> None:
        """Gives the file its final name, which lasts once the folder is synced. Replaces an earlier take's file."""
        os.rename(self.path, self.final)
        self._close()

    def discard(self) -> None:
        """Deletes the file if it is not published."""
        self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class ArtifactStore:
    """The artifact folder of one server. Raises StartupError when it cannot be made or written.

    It is listed once, at the start; a new scheduler ends up to a thousand jobs again, too many to list it for each.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._finished: dict[str, set[str]] = defaultdict(set)  # job -> names of files, until the job is pruned
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.sync()
            for name in os.listdir(self.folder):
                if match := _FINISHED.match(name):
                    self._finished[match[1]].add(name)
        except OSError as error:
            raise StartupError(f"cannot use the artifact folder {self.folder}: {error}") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise StartupError(f"the artifact folder {self.folder} is not writable: choose another --output-path")

    def path_of(self, job: str, attempt: int, index: int, extension: str) -> Path:
        """The final name of an output's file. Raises ProtocolError for a job id that is no ULID."""
        check_job_id(job)
        return self.folder / f"{job}-{attempt}-{index}.{extension}"

    def publish(self, job: str, partial: Partial) -> None:
        """Gives a sealed file its final name."""
        partial.publish()
        self._finished[job].add(partial.final.name)

    def sync(self) -> None:
        """Makes renames and deletions in the folder last."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sweep(self) -> list[Path]:
        """Deletes the temporary files whose writer is gone, and returns them."""
        stale = [path for path in self.folder.glob(f".*{PARTIAL_SUFFIX}") if _is_abandoned(path)]
        for path in stale:
            path.unlink(missing_ok=True)
        return stale

    def prune(self, job: str, keep: Iterable[str]) -> None:
        """Deletes the job's finished files that are not in `keep` (absolute paths)."""
        kept = {os.path.basename(path) for path in keep}
        for name in self._finished.pop(job, set()) - kept:
            (self.folder / name).unlink(missing_ok=True)


def check_job_id(job: str) -> None:
    """Job ids become parts of file names. Raises ProtocolError."""
    if not _JOB.fullmatch(job):
        raise ProtocolError(f"a job id is a ULID of 26 letters and digits, got {job!r}")


def _is_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # another user's, or just renamed
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
