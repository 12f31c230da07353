"""What `generate` says, line by line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.jobs import Job
from safelight.entrypoints.live import LiveReporter
from safelight.entrypoints.progress import JsonReporter, Pace, PlainReporter
from safelight.runtime.errors import JobFailed
from safelight.runtime.messages import MediaFormat, MediaSpec, Progress, Stage


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def job(number: int = 1, total: int = 1, outputs: int = 1) -> Job:
    params = SamplingParams(prompt="a red apple", seed=7, num_outputs_per_prompt=outputs)
    return Job(number, total, params, MediaSpec(MediaFormat.PNG), 0)


def denoising(step: int, **values: Any) -> Progress:
    return Progress("J", Stage.DENOISING, step=step, steps=10, **values)


def test_speed_and_time_left_follow_from_the_steps_seen() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.update(denoising(2)) == (None, None)
    clock.now += 2
    assert pace.update(denoising(6)) == (2.0, 2.0)
    assert pace.update(denoising(7, eta_ms=5000.0))[1] == 5.0


def test_a_resumed_job_and_a_new_stage_start_the_pace_again() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.update(denoising(5))
    clock.now += 1
    assert pace.update(denoising(2)) == (None, None)
    clock.now += 1
    assert pace.update(Progress("J", Stage.DECODING, step=1, steps=2)) == (None, None)


def test_plain_lines_tell_stages_and_steps_now_and_then() -> None:
    clock, log, out = Clock(), io.StringIO(), io.StringIO()
    reporter = PlainReporter(log, out, clock)
    reporter.phase("workers: loading")
    reporter.progress(job(), Progress("J", Stage.QUEUED, position=3))
    for step in range(1, 9):
        clock.now += 0.5
        reporter.progress(job(), denoising(step))
    reporter.progress(job(), Progress("J", Stage.SAVING))
    reporter.ended(job(), None, [Path("/o/a.png")])
    reporter.finish([Path("/o/a.png")], 0, 4.25)
    assert log.getvalue().splitlines() == [
        "workers: loading",
        "a red apple: queued, 3 ahead",
        "a red apple: denoising 1/10",
        "a red apple: denoising 5/10, 2.0 steps/s, 2 s left",
        "a red apple: saving",
        "4.2 s",
    ]
    assert out.getvalue() == "/o/a.png\n"


def test_plain_lines_number_jobs_and_outputs_and_name_failures() -> None:
    log, out = io.StringIO(), io.StringIO()
    reporter = PlainReporter(log, out, Clock())
    reporter.progress(job(2, 3, outputs=4), denoising(1, index=2))
    reporter.ended(job(2, 3), JobFailed("out of memory"), [])
    reporter.finish([], 1, 1.0)
    assert log.getvalue().splitlines() == [
        "2/3 a red apple: denoising 1/10 of output 3/4",
        "2/3 a red apple: failed: out of memory",
        "1 failed, 1.0 s",
    ]
    assert out.getvalue() == ""


def test_json_lines_end_with_the_paths() -> None:
    out = io.StringIO()
    reporter = JsonReporter(out)
    reporter.phase("workers: loading")
    reporter.note("ä note")
    reporter.progress(job(), denoising(1, eta_ms=500.0))
    reporter.ended(job(), None, [Path("/o/a.png")])
    reporter.ended(job(2), JobFailed("no"), [])
    reporter.finish([Path("/o/a.png")], 1, 1.5)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["phase", "note", "progress", "completed", "failed", "done"]
    assert lines[2] == {
        "event": "progress", "number": 1, "steps_per_s": None, "eta_s": 0.5, "stage": "denoising", "step": 1,
        "steps": 10,
    }  # fmt: skip
    assert lines[3] == {
        "event": "completed", "number": 1, "prompt": "a red apple", "seed": 7, "paths": ["/o/a.png"]
    }  # fmt: skip
    assert lines[-1] == {"event": "done", "paths": ["/o/a.png"], "failed": 1, "seconds": 1.5}


def test_the_live_bar_shows_steps_and_leaves_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    log, out = io.StringIO(), io.StringIO()
    reporter = LiveReporter(log, out)
    reporter.phase("workers: loading")
    reporter.progress(job(), denoising(3))
    reporter.note("[markup] is text")
    reporter.ended(job(), JobFailed("no"), [])
    reporter.finish([Path("/o/a.png")], 1, 1.5)
    reporter.close()
    shown = log.getvalue()
    assert "denoising 3/10" in shown
    assert "[markup] is text" in shown
    assert "a red apple: failed: no" in shown
    assert out.getvalue() == "/o/a.png\n"
