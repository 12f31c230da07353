"""The flow of `generate` with a fake server behind it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generate_server import FakeServer, fake_server, runner, write_model

from safelight.entrypoints import generate
from safelight.runtime.errors import ConfigError, InvalidRequest, JobFailed, ModelError, StartupError, WorkerLost
from safelight.runtime.messages import ErrorInfo, Event, GenerationRequest, MediaFormat, Status


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    return fake_server(tmp_path / "artifacts", monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "model")


@pytest.fixture
def run(server: FakeServer, model: str, tmp_path: Path) -> Callable[..., int]:
    return runner(model, tmp_path / "out")


def test_the_path_is_printed_last_and_alone_on_stdout(
    run: Callable[..., int], server: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    out, _ = capfd.readouterr()
    assert out == f"{tmp_path}/out/a-dog-7.png\n"
    assert (tmp_path / "out" / "a-dog-7.png").read_bytes() == b"picture"
    assert server.log == ["start", "submit a dog", "close", "stop"]
    assert server.slot_bytes >= 128 * 128 * 3


def test_jobs_wait_here_when_the_queue_is_smaller(
    run: Callable[..., int], server: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"dog {i}" for i in range(7)))
    assert run(prompt_path=str(tmp_path / "p.txt"), max_queue=2) == 0
    assert server.most_open == 2
    assert len(capfd.readouterr().out.splitlines()) == 7


def test_one_failed_job_does_not_stop_the_others(
    run: Callable[..., int], server: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a dog\nhuge\nbroken\na cat\n")

    def script(request: GenerationRequest, job: str) -> Event:
        if request.prompt == "broken":
            return Event(job, 0, status=Status.FAILED, error=ErrorInfo("job_failed", "out of memory"))
        return server.complete(request, job)

    server.script = script
    assert run(prompt_path=str(tmp_path / "p.txt")) == 1
    out, err = capfd.readouterr()
    assert [Path(line).name for line in out.splitlines()] == ["a-dog-7.png", "a-cat-7.png"]
    assert "2/4 huge: failed: it can never fit" in err
    assert "3/4 broken: failed: out of memory" in err


def test_previews_are_files_beside_the_result(
    run: Callable[..., int], server: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.preview_steps = (5, 10)
    out = tmp_path / "out"
    assert run(previews=2) == 0
    said, log = capfd.readouterr()
    assert said == f"{out}/a-dog-7.png\n"
    assert f"a dog: preview after step 10: {out}/a-dog-7-step-10.png" in log
    assert run(previews=2, json=True) == 0  # the names are taken now
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line for line in lines if line["event"] == "preview"] == [
        {"event": "preview", "number": 1, "index": 0, "step": step, "path": f"{out}/a-dog-7-step-{step}-2.png"}
        for step in (5, 10)
    ]
    assert lines[-1]["paths"] == [f"{out}/a-dog-7-2.png"]
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert [files.pop(f"a-dog-7-step-{step}.png") for step in (5, 10)] == [b"preview"] * 2
    assert len(files) == 4


@pytest.mark.parametrize(
    ("flags", "reason"), [({"previews": 21}, "at most 20"), ({"previews": 1, "save_output": False}, "no-save-output")]
)
def test_previews_that_cannot_be_kept_are_refused(
    run: Callable[..., int], server: FakeServer, flags: dict[str, Any], reason: str
) -> None:
    with pytest.raises((InvalidRequest, ConfigError), match=reason) as refused:
        run(**flags)
    assert refused.value.param == "previews"
    assert server.log == []


def test_a_model_without_factors_is_refused_previews(run: Callable[..., int], model: str, server: FakeServer) -> None:
    config = Path(model) / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latents_mean": [0.0] * 16}))
    with pytest.raises(InvalidRequest, match=r"fit_preview\.py"):
        run(previews=1)
    assert server.log == []
    assert run() == 0


def test_a_preview_that_cannot_be_saved_is_a_note(
    run: Callable[..., int], server: FakeServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Path:
        raise JobFailed("a-dog-7-step-5.png cannot be saved in out: no space left")

    server.preview_steps = (5,)
    monkeypatch.setattr(generate, "save_data", full)
    assert run(previews=1) == 0
    assert "note: a-dog-7-step-5.png cannot be saved" in capfd.readouterr().err


def test_without_save_output_nothing_is_kept(run: Callable[..., int], tmp_path: Path, capfd: Any) -> None:
    assert run(save_output=False) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "nothing saved" in err
    assert not (tmp_path / "out").exists()


def test_json_mode_says_everything_on_stdout(run: Callable[..., int], tmp_path: Path, capfd: Any) -> None:
    assert run(json=True) == 0
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[-1]["event"] == "done"
    assert lines[-1]["paths"] == [f"{tmp_path}/out/a-dog-7.png"]
    assert err == ""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_signal_cancels_stops_and_leaves_no_file(
    run: Callable[..., int], server: FakeServer, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(number)

    def interrupt(request: GenerationRequest, job: str) -> Event:
        server.open[job] = request
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the first SIGTERM only drains
        raise AssertionError("the signal interrupts")

    server.script = interrupt
    assert run() == code
    assert server.log[-3:] == ["cancel", "close", "stop"]
    assert list((tmp_path / "out").iterdir()) == []
    assert signal.getsignal(number) is before


def test_a_second_signal_kills_while_the_first_is_cleaned_up(
    run: Callable[..., int], server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(generate, "_kill", killed.append)

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        server.log.append("stopped all the same")

    monkeypatch.setattr(server, "stop", stop)
    assert run() == 0
    assert killed == [server]
    assert server.log[-1] == "stopped all the same"


def test_a_server_that_does_not_start_is_stopped_and_reported(run: Callable[..., int], server: FakeServer) -> None:
    server.ready_error = StartupError("worker 0 has no memory")
    with pytest.raises(StartupError, match="no memory"):
        run()
    assert server.log == ["start", "stop"]


def test_a_server_that_fails_on_the_way_ends_the_run(run: Callable[..., int], server: FakeServer) -> None:
    def fail(request: GenerationRequest, job: str) -> Event:
        server.failure = StartupError("no group is left")
        return Event(job, 0)

    server.script = fail
    with pytest.raises(StartupError, match="no group"):
        run()
    assert server.log[-1] == "stop"


def test_a_server_that_fails_before_it_answers_is_not_waited_for(
    run: Callable[..., int], server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: object, **__: object) -> str:
        server.failure = StartupError("the scheduler cannot run")
        raise WorkerLost("no answer")

    monkeypatch.setattr(server, "submit", silent)
    with pytest.raises(StartupError, match="scheduler cannot run"):
        run()


def test_nothing_is_started_for_a_wrong_model(run: Callable[..., int], server: FakeServer) -> None:
    with pytest.raises(ModelError):
        run(model_path="/no/such")
    assert server.log == []


def test_words_outside_the_vocabulary_get_a_note(run: Callable[..., int], model: str, capfd: Any) -> None:
    Path(model, "vocabulary.json").write_text('{"words": ["a", "dog"]}')
    assert run("a dog") == 0
    assert "knows simple subjects only" not in capfd.readouterr().err
    assert run("a quasar") == 0
    assert "knows simple subjects only; not among its words: quasar" in capfd.readouterr().err


def test_the_format_reaches_the_request(run: Callable[..., int], server: FakeServer) -> None:
    seen: list[GenerationRequest] = []

    def script(request: GenerationRequest, job: str) -> Event:
        seen.append(request)
        return server.complete(request, job)

    server.script = script
    assert run(output_format="webp", output_quality=70, return_frames=True) == 0
    assert seen[0].media.format is MediaFormat.WEBP
    assert seen[0].media.quality == 70
    assert seen[0].media.with_frames
