"""What `generate` tells while it works: a live bar on a terminal, plain lines elsewhere, JSON lines for machines.

Progress goes to stderr and results to stdout, except that all JSON goes to stdout.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

import msgspec

from safelight.entrypoints.jobs import Job
from safelight.entrypoints.previews import Preview
from safelight.runtime.errors import SafelightError
from safelight.runtime.messages import Progress, Stage

Clock = Callable[[], float]
_LABEL_LENGTH = 32
_LINE_EVERY_S = 2.0


class Pace:
    """Speed and remaining time of one stage of one output, from the steps seen so far."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._stage: tuple[Stage, int] | None = None
        self._first = (0.0, 0)

    def update(self, progress: Progress) -> tuple[float | None, float | None]:
        """(steps per second, seconds left), None where not known yet. The scheduler's estimate wins over ours."""
        now, stage = self._clock(), (progress.stage, progress.index)
        if stage != self._stage or progress.step < self._first[1]:  # a resumed job may go back
            self._stage, self._first = stage, (now, progress.step)
        seconds, steps = now - self._first[0], progress.step - self._first[1]
        speed = steps / seconds if steps and seconds > 0 else None
        left = (progress.steps - progress.step) / speed if speed else None
        return speed, progress.eta_ms / 1000 if progress.eta_ms is not None else left


def describe(job: Job, progress: Progress) -> str:
    """`denoising 3/20`, with the output's number when there are several."""
    outputs = job.params.num_outputs_per_prompt or 1
    text = progress.stage.value
    if progress.stage is Stage.QUEUED and progress.position:
        return f"{text}, {progress.position} ahead"
    if progress.steps:
        text += f" {progress.step}/{progress.steps}"
    return text + (f" of output {progress.index + 1}/{outputs}" if outputs > 1 else "")


def label(job: Job) -> str:
    prompt = " ".join(job.params.prompt.split())
    short = prompt if len(prompt) <= _LABEL_LENGTH else prompt[: _LABEL_LENGTH - 1] + "…"
    return f"{job.number}/{job.total} {short}" if job.total > 1 else short


def pace_text(speed: float | None, left: float | None) -> str:
    if speed is None:
        return f", {left:.0f} s left" if left is not None else ""
    rate = f"{speed:.1f} steps/s" if speed >= 1 else f"{1 / speed:.1f} s/step"
    return f", {rate}" + (f", {left:.0f} s left" if left is not None else "")


class Reporter(Protocol):
    """Receives what happens, in order. `close` may be called twice."""

    def phase(self, text: str) -> None:
        """The server's start-up went on."""

    def progress(self, job: Job, progress: Progress) -> None:
        """A job went on."""

    def preview(self, job: Job, preview: Preview, path: Path) -> None:
        """A preview of a job is saved at `path`."""

    def note(self, text: str) -> None:
        """Something to know that is no error."""

    def ended(self, job: Job, error: SafelightError | None, paths: list[Path]) -> None:
        """A job is over; its results are saved at `paths`."""

    def finish(self, paths: list[Path], failed: int, seconds: float) -> None:
        """All is over: the last thing said is where the results are."""

    def close(self) -> None:
        """Leaves the terminal as it was."""


class PlainReporter:
    """Lines on stderr: every change of stage, and steps at most every two seconds."""

    def __init__(self, log: TextIO, out: TextIO, clock: Clock = time.monotonic) -> None:
        self._log, self._out, self._clock = log, out, clock
        self._paces: dict[int, Pace] = {}
        self._said: dict[int, tuple[Stage, int, float]] = {}

    def phase(self, text: str) -> None:
        print(text, file=self._log, flush=True)

    note = phase

    def preview(self, job: Job, preview: Preview, path: Path) -> None:
        self.note(f"{label(job)}: preview after step {preview.step}: {path}")

    def progress(self, job: Job, progress: Progress) -> None:
        speed, left = self._paces.setdefault(job.number, Pace(self._clock)).update(progress)
        stage, index, when = self._said.get(job.number, (None, 0, 0.0))
        now = self._clock()
        if (stage, index) != (progress.stage, progress.index) or now - when >= _LINE_EVERY_S:
            self._said[job.number] = (progress.stage, progress.index, now)
            self.phase(f"{label(job)}: {describe(job, progress)}{pace_text(speed, left)}")

    def ended(self, job: Job, error: SafelightError | None, paths: list[Path]) -> None:
        self._paces.pop(job.number, None)
        if error or job.total > 1:
            self.phase(f"{label(job)}: " + (f"failed: {error.message}" if error else "done"))

    def finish(self, paths: list[Path], failed: int, seconds: float) -> None:
        self.close()
        unsaved = "" if paths or failed else ", nothing saved"
        print(f"{f'{failed} failed, ' if failed else ''}{seconds:.1f} s{unsaved}", file=self._log, flush=True)
        for path in paths:
            print(path, file=self._out, flush=True)

    def close(self) -> None:
        """Nothing to restore."""


class JsonReporter:
    """One object a line on stdout; `event` says which kind; the last line of a run has `paths`."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._paces: dict[int, Pace] = {}

    def _say(self, event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}, ensure_ascii=False), file=self._out, flush=True)

    def phase(self, text: str) -> None:
        self._say("phase", phase=text)

    def note(self, text: str) -> None:
        self._say("note", text=text)

    def preview(self, job: Job, preview: Preview, path: Path) -> None:
        self._say("preview", number=job.number, index=preview.index, step=preview.step, path=str(path))

    def progress(self, job: Job, progress: Progress) -> None:
        speed, left = self._paces.setdefault(job.number, Pace()).update(progress)
        values = msgspec.to_builtins(progress)
        for name in ("type", "job", "eta_ms"):
            values.pop(name, None)
        self._say("progress", number=job.number, steps_per_s=speed, eta_s=left, **values)

    def ended(self, job: Job, error: SafelightError | None, paths: list[Path]) -> None:
        if error:
            self._say("failed", number=job.number, code=error.code, message=error.message, param=error.param)
        else:
            names = [str(path) for path in paths]
            self._say("completed", number=job.number, prompt=job.params.prompt, seed=job.params.seed, paths=names)

    def finish(self, paths: list[Path], failed: int, seconds: float) -> None:
        self._say("done", paths=[str(path) for path in paths], failed=failed, seconds=round(seconds, 3))

    def close(self) -> None:
        """Nothing to restore."""
