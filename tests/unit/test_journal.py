"""The journal: what it keeps over a restart, and who may open it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from scheduler_world import make_request

from safelight.runtime import messages as m
from safelight.runtime.errors import StartupError
from safelight.runtime.scheduler.journal import Journal
from safelight.runtime.scheduler.records import (
    AdmissionRecord,
    ArtifactRecord,
    CheckpointRecord,
    ForgetRecord,
    Record,
    SubmitRecord,
    TerminalRecord,
)


def submit(job: str, seq: int = 0) -> SubmitRecord:
    return SubmitRecord(job, "me", seq, b"hash", make_request(), True, m.Priority.NORMAL, 1000.0)


def artifact(index: int) -> m.Artifact:
    return m.Artifact(index, f"/file-{index}", "image/png", 1, "0")


def write(path: Path, *records: Record) -> None:
    journal = Journal(path)
    for token, record in enumerate(records, 1):
        journal.write(token, record)
    journal.close()
    assert journal.committed == len(records)


def test_histories_survive_in_order_of_acceptance(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    ref = m.CheckpointRef("/c", 4, "0")
    write(
        path, submit("b", 1), submit("a", 2), AdmissionRecord("b", 0, 0, 0), ArtifactRecord("b", artifact(1)),
        ArtifactRecord("b", artifact(0)), CheckpointRecord("b", 0, 2, ref), TerminalRecord("a", m.Status.CANCELLED),
    )  # fmt: skip
    journal = Journal(path)
    journal.close()
    first, second = journal.recovered.histories
    assert (first.submit, second.submit) == (submit("b", 1), submit("a", 2))
    assert first.artifacts == {0: artifact(0), 1: artifact(1)}
    assert first.checkpoint is not None
    assert first.checkpoint.ref == ref
    assert first.terminal is None
    assert second.terminal == TerminalRecord("a", m.Status.CANCELLED)


def test_first_terminal_wins_and_latest_admission_and_checkpoint_count(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    old, new = m.CheckpointRef("/old", 2, "0"), m.CheckpointRef("/new", 4, "0")
    write(
        path, submit("a"), AdmissionRecord("a", 0, 0, 0), AdmissionRecord("a", 1, 1, 3),
        CheckpointRecord("a", 0, 0, old), CheckpointRecord("a", 1, 0, new),
        TerminalRecord("a", m.Status.COMPLETED), TerminalRecord("a", m.Status.FAILED),
    )  # fmt: skip
    journal = Journal(path)
    journal.close()
    (history,) = journal.recovered.histories
    assert history.terminal == TerminalRecord("a", m.Status.COMPLETED)
    assert history.admission == AdmissionRecord("a", 1, 1, 3)
    assert history.checkpoint == CheckpointRecord("a", 1, 0, new)


def test_epoch_grows_with_every_opening(tmp_path: Path) -> None:
    epochs = []
    for _ in range(3):
        journal = Journal(tmp_path / "journal.db")
        journal.close()
        epochs.append(journal.recovered.scheduler_epoch)
    assert epochs == [1, 2, 3]


def test_forgotten_jobs_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    write(path, submit("a"), TerminalRecord("a", m.Status.FAILED), submit("b", 1), ForgetRecord("a"))
    journal = Journal(path)
    journal.close()
    assert [h.submit.job for h in journal.recovered.histories] == ["b"]


def test_commits_are_announced_and_on_disk_then(tmp_path: Path) -> None:
    path, told = tmp_path / "journal.db", threading.Event()
    journal = Journal(path, told.set)
    journal.write(7, submit("a"))
    assert told.wait(10)
    assert journal.committed == 7
    with sqlite3.connect(path) as reader:
        assert reader.execute("SELECT job, kind FROM records").fetchall() == [("a", "SubmitRecord")]
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    reader.close()
    journal.close()


def test_a_second_opener_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(path)
    code = (
        "import sys; from pathlib import Path\n"
        "from safelight.runtime.scheduler.journal import Journal\n"
        "from safelight.runtime.errors import StartupError\n"
        "try: Journal(Path(sys.argv[1]))\n"
        "except StartupError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "in use by another server" in found.stdout
    with pytest.raises(StartupError, match="in use"):
        Journal(path)
    journal.close()
    Journal(path).close()


def test_a_killed_owner_leaves_no_lock_and_no_half_record(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    code = (
        "import os, signal, sys, threading; from pathlib import Path\n"
        "from safelight.runtime.messages import Status\n"
        "from safelight.runtime.scheduler.journal import Journal\n"
        "from safelight.runtime.scheduler.records import TerminalRecord\n"
        "told = threading.Event(); journal = Journal(Path(sys.argv[1]), told.set)\n"
        "journal.write(1, TerminalRecord('a', Status.FAILED)); told.wait()\n"
        "for n in range(2, 500): journal.write(n, TerminalRecord(f'a{n:03}', Status.FAILED))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -9
    journal = Journal(path)
    journal.close()
    assert journal.recovered.scheduler_epoch == 2
    with sqlite3.connect(path) as db:
        jobs = [job for (job,) in db.execute("SELECT job FROM records ORDER BY job")]
    db.close()
    assert jobs == ["a", *(f"a{n:03}" for n in range(2, len(jobs) + 1))]


@pytest.mark.parametrize("content", [b"this is no database", b""])
def test_a_file_that_is_no_journal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(content * 200)
    if content:
        with pytest.raises(StartupError, match="move it away"):
            Journal(path)
    else:
        Journal(path).close()


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'schema'")
    db.close()
    with pytest.raises(StartupError, match="schema 99"):
        Journal(path)


def test_an_unwritable_folder_is_a_startup_error(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="not writable"):
        Journal(tmp_path / "missing" / "journal.db")
