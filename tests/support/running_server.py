"""A running server and hands to hurt its processes with, for the end-to-end tests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.entrypoints.client import Client
from safelight.runtime.launch.supervisor import Supervisor
from safelight.runtime.messages import Event, GenerationRequest, MediaFormat, MediaSpec, Stage


def request(**changes: Any) -> GenerationRequest:
    """A small job: 32x32, 5 frames, 6 steps unless changed."""
    values: dict[str, Any] = {
        "prompt": "a cat",
        "negative_prompt": "",
        "token_ids": {"prompt": (20, 8, 1), "negative": (1,)},
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "fps": 8,
        "num_inference_steps": 6,
        "guidance_scale": 5.0,
        "seed": 1,
        "num_outputs": 1,
        "sampler": "unipc",
        "media": MediaSpec(MediaFormat.NPY),
    }
    return GenerationRequest(**values | changes)


@dataclass
class Running:
    """A started server, a client of it, and hands to hurt its processes with."""

    server: Supervisor
    client: Client
    seen: dict[str, list[Event]] = field(default_factory=dict)

    def pid(self, role: str) -> int:
        return self.server.pids()[role]

    def kill(self, role: str, number: signal.Signals = signal.SIGKILL) -> int:
        pid = self.pid(role)
        os.kill(pid, number)
        return pid

    def until(self, accept: Callable[[Event], bool], timeout_s: float = 60.0) -> Event:
        """The next event that is accepted; all events are kept in `seen`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = None
            for event in self.client.poll(1.0):
                assert isinstance(event, Event), "no job here asks for previews"
                self.seen.setdefault(event.job, []).append(event)
                found = event if found is None and accept(event) else found
            if found:
                return found
        raise AssertionError(f"no such event in {timeout_s:.0f} s; seen {self.seen}")

    def at_step(self, job: str, step: int) -> Event:
        """Waits until a job reports at least `step` steps of denoising, or a later stage."""

        def reached(event: Event) -> bool:
            progress = event.progress
            return event.job == job and (
                event.status is not None
                or (
                    progress is not None
                    and (
                        progress.stage in (Stage.DECODING, Stage.SAVING)
                        or (progress.stage is Stage.DENOISING and progress.step >= step)
                    )
                )
            )

        return self.until(reached)

    def terminals(self, jobs: list[str], timeout_s: float = 90.0) -> dict[str, Event]:
        """The terminal event of each job."""

        def done() -> dict[str, Event]:
            return {j: e for j in jobs for e in self.seen.get(j, ()) if e.status is not None}

        deadline = time.monotonic() + timeout_s
        while len(done()) < len(jobs):
            assert self.server.failure is None, self.server.failure
            assert time.monotonic() < deadline, f"no terminal in {timeout_s:.0f} s: {self.seen}"
            for event in self.client.poll(1.0):
                assert isinstance(event, Event), "no job here asks for previews"
                self.seen.setdefault(event.job, []).append(event)
        for job in jobs:
            assert sum(e.status is not None for e in self.seen[job]) == 1, "one terminal each"
        return done()


Start = Callable[..., Running]


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
