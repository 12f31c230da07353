"""The flow of `generate` with a fake server behind it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints import generate
from safelight.entrypoints.jobs import Job
from safelight.runtime.errors import ModelError, StartupError, TooLarge, WorkerLost
from safelight.runtime.messages import Artifact, ErrorInfo, Event, GenerationRequest, MediaFormat, Status


class FakeServer:
    """Supervisor and client in one: each submitted job ends as `script(request)` says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, list[str]()
        self.script: Callable[[GenerationRequest, str], Event] = self.complete
        self.failure: StartupError | None = None
        self.ready_error: StartupError | None = None
        self.open: dict[str, GenerationRequest] = {}
        self.most_open = 0
        self.args: ServerArgs | None = None
        self.slot_bytes = 0

    def complete(self, request: GenerationRequest, job: str) -> Event:
        path = self.folder / f"{job}.png"
        path.write_bytes(b"picture")
        return Event(job, 0, status=Status.COMPLETED, artifacts=(Artifact(0, str(path), "image/png", 7, ""),))

    # the supervisor
    endpoints = None

    def start(self) -> None:
        self.log.append("start")

    def wait_ready(self, timeout: float, on_phase: Callable[[str], None]) -> None:
        on_phase("loading")
        if self.ready_error:
            raise self.ready_error

    def stop(self) -> None:
        self.log.append("stop")

    def pids(self) -> dict[str, int]:
        return {}

    # the client
    def submit(self, request: GenerationRequest, job: str, timeout_s: float) -> str:
        self.log.append(f"submit {request.prompt}")
        if request.prompt == "huge":
            raise TooLarge("it can never fit")
        self.open[job] = request
        self.most_open = max(self.most_open, len(self.open))
        return job

    def poll(self, timeout_s: float) -> list[Event]:
        return [self.script(self.open.pop(job), job) for job in list(self.open)]

    def cancel(self, job: str, timeout_s: float) -> None:
        self.log.append("cancel")

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append("close")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer(tmp_path / "artifacts")
    fake.folder.mkdir()

    def supervise(args: ServerArgs, root: Path, slot_bytes: int) -> FakeServer:
        fake.args, fake.slot_bytes = args, slot_bytes
        return fake

    def tokenized(spec: Any, jobs: list[Job]) -> list[GenerationRequest]:
        made = []
        for job in jobs:
            p: Any = job.params
            made.append(
                GenerationRequest(
                    p.prompt,
                    "",
                    {"prompt": (1,)},
                    p.height,
                    p.width,
                    p.num_frames,
                    p.fps,
                    p.num_inference_steps,
                    p.guidance_scale,
                    p.seed,
                    p.num_outputs_per_prompt,
                    p.sampler,
                    job.media,
                )
            )
        return made

    monkeypatch.setattr(generate, "Supervisor", supervise)
    monkeypatch.setattr(generate, "Client", lambda endpoints: fake)
    monkeypatch.setattr(generate, "requests", tokenized)
    return fake


@pytest.fixture
def model(tmp_path: Path) -> str:
    files = {
        "model_index.json": {"_class_name": "WanPipeline"},
        "transformer/config.json": {
            "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "in_channels": 16, "ffn_dim": 32,
            "text_dim": 16,
        },
        "vae/config.json": {"dim_mult": [1, 2, 4, 4], "base_dim": 8},
        "text_encoder/config.json": {"d_model": 16, "num_layers": 1},
        "scheduler/scheduler_config.json": {"_class_name": "UniPCMultistepScheduler"},
    }  # fmt: skip
    for name, content in files.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return str(tmp_path / "model")


@pytest.fixture
def run(server: FakeServer, model: str, tmp_path: Path) -> Callable[..., int]:
    def call(prompt: str = "a dog", **options: Any) -> int:
        server_options = {name: options.pop(name) for name in ("max_queue", "model_path") if name in options}
        files = GenerateArgs(**{"output_path": str(tmp_path / "out"), **options})
        params = SamplingParams(prompt="" if files.prompt_path else prompt, seed=7)
        return generate.run(params, files, ServerArgs(**{"model_path": model, **server_options}))

    return call


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
