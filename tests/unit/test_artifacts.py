"""Whole files or none: names, renames, sweeps and pruning."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.runtime.errors import ProtocolError, StartupError
from safelight.runtime.output.artifacts import ArtifactStore, Partial

JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
OTHER = "01BX5ZZKBKACTAV9WEVGEMMVRZ"


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_file_appears_under_its_name_only_when_published(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "new" / "folder")
    partial = Partial(store.path_of(JOB, 1, 2, "png"), take=0)
    partial.path.write_bytes(b"pixels")
    assert visible(store.folder) == []
    seal = partial.seal()
    partial.publish()
    store.sync()
    assert visible(store.folder) == [f"{JOB}-1-2.png"]
    assert seal.nbytes == 6
    assert seal.sha256 == hashlib.sha256(b"pixels").hexdigest()
    assert len(list(store.folder.iterdir())) == 1


def test_discarded_file_is_gone(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    Partial(store.path_of(JOB, 0, 0, "png"), take=0).discard()
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_only_a_hidden_file_that_the_next_start_sweeps(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from safelight.runtime.output.artifacts import *\n"
        f"partial = Partial(ArtifactStore(sys.argv[1]).path_of({JOB!r}, 0, 0, 'mp4'), 0)\n"
        "partial.path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    assert visible(tmp_path) == []
    store = ArtifactStore(tmp_path)
    mine = Partial(store.path_of(OTHER, 0, 0, "png"), take=0)
    (tmp_path / ".something.else").touch()
    assert [path.name for path in store.sweep()] == [f".{JOB}-0-0.mp4.0.partial"]
    assert mine.path.exists()
    mine.discard()
    assert [path.name for path in tmp_path.iterdir()] == [".something.else"]


def test_prune_deletes_the_other_files_of_that_job_only(tmp_path: Path) -> None:
    for name in (f"{JOB}-0-0.png", f"{JOB}-1-0.png", f"{JOB}-1-0.npy", f"{OTHER}-0-0.png", "mine.png"):
        (tmp_path / name).touch()
    store = ArtifactStore(tmp_path)
    store.publish(JOB, Partial(store.path_of(JOB, 2, 0, "png"), take=0))
    store.prune("../../..", [])
    store.prune(JOB, [str(tmp_path / f"{JOB}-1-0.png")])
    assert visible(tmp_path) == [f"{JOB}-1-0.png", f"{OTHER}-0-0.png", "mine.png"]


@pytest.mark.parametrize("job", ["", "*", "../../etc/passwd/aaaaaaaaaa", "a" * 25, "a" * 26 + "\n"])
def test_job_ids_that_are_no_ulids_name_no_files(tmp_path: Path, job: str) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(ProtocolError):
        store.path_of(job, 0, 0, "png")


def test_folder_that_cannot_be_made_is_a_startup_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="artifact folder"):
        ArtifactStore(tmp_path / "file" / "folder")
