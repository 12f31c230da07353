"""`safelight serve` as a user starts it, in processes of its own, and hands to hurt them with."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2


@dataclass
class Served:
    """A running `serve`; `log` is what it said so far."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60)

    def said(self, pattern: str, timeout_s: float = 60.0) -> re.Match[str]:
        """Waits for a line."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found[:] = [match for line in self.log if (match := re.search(pattern, line))]
            return bool(found) or self.process.poll() is not None

        with self.changed:
            self.changed.wait_for(look, timeout_s)
        assert found, f"{pattern!r} was not said: {''.join(self.log)}"
        return found[0]

    def pids(self) -> dict[str, int]:
        """Process ids by role: supervisor, scheduler, output, frontend, worker 0, worker 1, ..."""
        parents, commands = {}, {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z":
                    parents[int(folder.name)] = int(stat[1])
                    commands[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        mine = {pid for pid, parent in parents.items() if parent == self.process.pid}
        found = {"supervisor": self.process.pid}
        for pid in mine:
            if "safelight.runtime.launch.child" in commands[pid]:
                found[commands[pid][-2]] = pid
            elif any("forkserver" in part for part in commands[pid]):
                ranks = sorted(p for p, parent in parents.items() if parent == pid)
                found |= {f"worker {number}": rank for number, rank in enumerate(ranks)}
        return found

    def signal(self, role: str, number: signal.Signals = signal.SIGKILL) -> int:
        pid = self.pids()[role]
        os.kill(pid, number)
        return pid

    def until(self, path: str, condition: Any, timeout_s: float = 60.0) -> Any:
        """The first JSON of `path` that fulfils the condition; None stands for no answer."""
        deadline, last = time.monotonic() + timeout_s, None
        while time.monotonic() < deadline:
            last = self.get(path)
            if condition(last):
                return last
            time.sleep(0.02)
        raise AssertionError(f"{path} was {last} for {timeout_s} s: {''.join(self.log[-20:])}")

    def get(self, path: str) -> Any:
        try:
            return httpx2.get(self.url + path, timeout=1.5).json()
        except httpx2.HTTPError:
            return None

    def unwell(self, role: str, pid: int) -> None:
        """Waits until /health says so, or until a process has a successor, which may be before anybody looks."""

        def told(found: Any) -> bool:
            return found is None or found["status"] != "ok" or self.pids().get(role) != pid

        self.until("/health", told, 3)  # two seconds, and what a busy machine needs to say so

    def healthy(self, timeout_s: float = 60.0) -> None:
        self.until("/health", lambda found: found is not None and found["status"] == "ok", timeout_s)


@contextlib.contextmanager
def serve(*flags: str, module: str = "safelight", cwd: Path | None = None, ready: bool = True) -> Iterator[Served]:
    """Runs `serve` on a free port until the end of the block."""
    command = [sys.executable, "-m", module, *(["serve"] if module == "safelight" else [])]
    command += ["--port", "0", "--device", "cpu", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=cwd)
    served = Served(process)

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with served.changed:
                served.log.append(line)
                served.changed.notify_all()
        with served.changed:
            served.changed.notify_all()

    reader = threading.Thread(target=read, name="log")
    reader.start()
    try:
        if ready:
            served.url = served.said(r"listening on (http://\S+);")[1]
            served.said(r"ready: http")
            served.until("/ready", lambda found: found is not None and found["ready"])
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()
