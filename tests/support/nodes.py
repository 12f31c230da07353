"""Nodes of a cluster on one machine: network namespaces joined by a bridge, each with shared memory of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_NETWORK = f"10.{128 + os.getpid() // 256 % 64}.{os.getpid() % 256}"  # another one for every test process


def why_not() -> str | None:
    """Why this machine can have no nodes; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the ip command (iproute2)"
    name = f"sl{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Node:
    """One namespace: `address` on `interface`, reachable from the other nodes and from this process."""

    def __init__(self, number: int) -> None:
        self.namespace = f"sl{os.getpid()}n{number}"
        self.interface = "eth0"
        self.address = f"{_NETWORK}.{number + 1}"

    def command(self, *argv: str) -> list[str]:
        private = 'mount -t tmpfs none /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "sh", "-c", private, "sh", *argv]


@contextlib.contextmanager
def cluster(count: int) -> Iterator[list[Node]]:
    """`count` nodes on a bridge, which are gone afterwards."""
    bridge, nodes = f"slb{os.getpid()}", [Node(number) for number in range(count)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{_NETWORK}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, node in enumerate(nodes):
            outside = f"sl{os.getpid()}v{number}"
            _ip("netns", "add", node.namespace)
            _ip("link", "add", outside, "type", "veth", "peer", "name", node.interface, "netns", node.namespace)
            _ip("link", "set", outside, "master", bridge, "up")
            _ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", node.interface)
            _ip("-n", node.namespace, "link", "set", "lo", "up")
            _ip("-n", node.namespace, "link", "set", node.interface, "up")
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def _ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True)


class Program:
    """A started process (of a session of its own) whose output is read as it comes."""

    def __init__(self, argv: Sequence[str], *, threads: str = "1") -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("SAFELIGHT_", "SGLANG_"))}
        environ |= {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, start_new_session=True
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def events(self) -> list[dict[str, Any]]:
        """The JSON lines so far."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def until(self, found: Callable[[list[dict[str, Any]]], object], timeout_s: float = 60.0) -> None:
        """Waits for events that `found` accepts. Raises AssertionError with the output when they do not come."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not found(self.events()):
                assert self._reader.is_alive(), self.output
                assert self._changed.wait(max(0.0, deadline - time.monotonic())), self.output

    def wait(self, timeout_s: float = 90.0) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code

    def kill(self) -> None:
        """Ends it and what it started."""
        for pid in [*self.pids(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def pids(self) -> set[int]:
        """All living processes below it, in whatever session."""
        below, found = children(), set[int]()
        frontier = {self.process.pid}
        while frontier:
            frontier = {child for pid in frontier for child in below.get(pid, ())} - found
            found |= frontier
        return found

    def rank(self, rank: int) -> int:
        """The process of a rank: torchrun says in its environment which it is."""
        wanted = f"RANK={rank}".encode()
        for pid in self.pids():
            with contextlib.suppress(OSError):
                is_frontend = b"safelight.entrypoints.worker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
                if not is_frontend and wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
        raise AssertionError(f"no rank {rank} here: {self.output}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def children() -> dict[int, list[int]]:
    """Every process by its parent."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found.setdefault(parent, []).append(int(entry.name))
    return found
