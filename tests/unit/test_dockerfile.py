"""The image's steps, as far as they can be tried without an engine: what it copies, who runs, how health is asked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_backend import FakeBackend, http_server

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def test_everything_that_is_copied_is_there_and_everything_linked_is_copied() -> None:
    copied = {source for line in re.findall(r"^COPY (.+)$", TEXT, re.MULTILINE) for source in line.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    linked = {path.resolve().name for path in (ROOT / "src" / "safelight").iterdir() if path.is_symlink()}
    assert linked | {"src", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied


def test_it_runs_as_nobody_special_and_imports_nothing_from_the_working_directory() -> None:
    assert TEXT.index("\nUSER safelight") < TEXT.index("\nENTRYPOINT")
    assert re.search(r"^ENV .*PYTHONSAFEPATH=1", TEXT, re.MULTILINE)
    assert re.search(r"^FROM nvidia/cuda:\S+-runtime-", TEXT, re.MULTILINE)


@pytest.mark.parametrize("well", [True, False])
def test_the_health_check_fails_when_the_server_is_not_well(tmp_path: Path, well: bool) -> None:
    found = re.search(r"HEALTHCHECK .* CMD (\[.+\])", TEXT)
    assert found is not None
    _python, flag, program = json.loads(found[1])
    with FakeBackend(tmp_path) as backend:
        backend.silent = not well
        with http_server(backend) as url:
            if well:
                subprocess.run([sys.executable, "-c", WAIT, url], check=True, timeout=30)
            command = [sys.executable, flag, program.replace("http://127.0.0.1:30000", url)]
            environ = {**os.environ, "PYTHONSAFEPATH": "1"}
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environ)
    assert (done.returncode == 0) is well, done.stderr


WAIT = """
import sys, time, urllib.request
for _ in range(200):
    try:
        sys.exit(urllib.request.urlopen(sys.argv[1] + "/health").status != 200)
    except urllib.error.HTTPError:
        time.sleep(0.05)
"""
