"""The live progress bar of a terminal. Apart from progress.py, because importing rich takes a while."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from safelight.entrypoints.jobs import Job
from safelight.entrypoints.progress import Pace, PlainReporter, describe, label, pace_text
from safelight.runtime import messages
from safelight.runtime.errors import SafelightError


class LiveReporter(PlainReporter):
    """One bar for the start-up, then one for each running job; they vanish at the end, notes and errors stay."""

    def __init__(self, log: TextIO, out: TextIO) -> None:
        super().__init__(log, out)
        self._console = Console(file=log)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[int, TaskID] = {}
        self._start = self._bars.add_task("starting", total=None, state="")
        self._bars.start()

    def phase(self, text: str) -> None:
        self._bars.update(self._start, state=text)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def progress(self, job: Job, progress: messages.Progress) -> None:
        self._bars.update(self._start, visible=False)
        new = job.number not in self._tasks
        if new:
            self._tasks[job.number] = self._bars.add_task(label(job), total=None, state="")
        speed, left = self._paces.setdefault(job.number, Pace()).update(progress)
        state = describe(job, progress) + pace_text(speed, left)
        # A total of None is a pulsing bar: stages without steps.
        task = self._tasks[job.number]
        self._bars.update(task, total=progress.steps or None, completed=progress.step, state=state, refresh=new)

    def ended(self, job: Job, error: SafelightError | None, paths: list[Path]) -> None:
        if job.number in self._tasks:
            self._bars.remove_task(self._tasks.pop(job.number))
        if error:
            self.note(f"{label(job)}: failed: {error.message}")

    def finish(self, paths: list[Path], failed: int, seconds: float) -> None:
        self.close()
        super().finish(paths, failed, seconds)

    def close(self) -> None:
        self._bars.stop()
