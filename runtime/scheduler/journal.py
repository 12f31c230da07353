"""The journal: what must survive this process, in SQLite (WAL, synchronous=FULL).

One row per (job, kind, part): submits, artifacts and terminals are written once (the first wins), admissions and
checkpoints replace the one before. `write` returns at once; a thread commits everything that waits in one transaction
and calls `notify`, after which `committed` is the newest token on disk. One process at a time may have it open.
"""

from __future__ import annotations

import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from safelight.runtime.errors import StartupError
from safelight.runtime.scheduler.records import (
    AdmissionRecord,
    CheckpointRecord,
    ForgetRecord,
    History,
    Record,
    replay,
)

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    job TEXT NOT NULL, kind TEXT NOT NULL, part INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (job, kind, part)
);
"""
_INSERT = "INSERT OR {conflict} INTO records (job, kind, part, body) VALUES (?, ?, ?, ?)"
_FIRST_WINS, _LAST_WINS = _INSERT.format(conflict="IGNORE"), _INSERT.format(conflict="REPLACE")


@dataclass(frozen=True, slots=True)
class Recovered:
    scheduler_epoch: int  # raised and on disk
    histories: list[History]


class Journal:
    """`recovered` is what the file held. Raises StartupError when it is in use, unreadable or of another version."""

    def __init__(self, path: Path, notify: Callable[[], None] = lambda: None) -> None:
        self.committed = 0
        self.failure: sqlite3.Error | None = None
        self._notify = notify
        self._lock = _lock(path)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self.recovered = self._open(path)
        except (sqlite3.Error, msgspec.MsgspecError, StartupError) as error:
            os.close(self._lock)
            if isinstance(error, StartupError):
                raise
            raise StartupError(f"the journal {path} cannot be read: {error}; move it away to start afresh") from error
        self._queue: queue.SimpleQueue[tuple[int, Record] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def write(self, token: int, record: Record) -> None:
        """Queues a record; tokens grow."""
        self._queue.put((token, record))

    def close(self) -> None:
        """Commits what waits and lets go of the file."""
        self._queue.put(None)
        self._thread.join()
        self._db.close()
        os.close(self._lock)

    def _open(self, path: Path) -> Recovered:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?), ('epoch', 0)", (SCHEMA_VERSION,))
        meta = dict(self._db.execute("SELECT key, value FROM meta"))
        if meta["schema"] != SCHEMA_VERSION:
            raise StartupError(
                f"the journal {path} has schema {meta['schema']}, this version reads {SCHEMA_VERSION}; move it away"
            )
        epoch = meta["epoch"] + 1
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (epoch,))
        decoder = msgspec.msgpack.Decoder(Record)
        # submits first: a job's history begins with its submit
        rows = self._db.execute("SELECT body FROM records ORDER BY kind != 'SubmitRecord'")
        return Recovered(epoch, replay(decoder.decode(body) for (body,) in rows))

    def _run(self) -> None:
        stop = False
        while not stop:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            entries = [e for e in batch if e is not None]
            stop = len(entries) < len(batch)
            try:
                self._commit([record for _, record in entries])
            except sqlite3.Error as error:
                self.failure, stop = error, True
            else:
                self.committed = entries[-1][0] if entries else self.committed
            self._notify()

    def _commit(self, records: Sequence[Record]) -> None:
        self._db.execute("BEGIN")
        for record in records:
            if isinstance(record, ForgetRecord):
                self._db.execute("DELETE FROM records WHERE job = ?", (record.job,))
                continue
            sql = _LAST_WINS if isinstance(record, AdmissionRecord | CheckpointRecord) else _FIRST_WINS
            row = (record.job, type(record).__name__, record.part, msgspec.msgpack.encode(record))
            self._db.execute(sql, row)
        self._db.execute("COMMIT")


def _lock(path: Path) -> int:
    """An exclusive lock that ends with this process, however it ends."""
    try:
        fd = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"the journal's folder {path.parent} is not writable: {error}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise StartupError(
            f"the journal {path} is in use by another server; give this one a folder of its own"
        ) from error
    return fd
