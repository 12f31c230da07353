"""`generate --state-dir` and `--resume` with a fake server behind it, and slices of a prompt file."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generate_server import FakeServer, fake_server, runner, write_model

from safelight.configs.backend import backend_settings
from safelight.configs.families import identify
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.jobs import Job, read_jobs
from safelight.entrypoints.kept_run import KeptRun
from safelight.entrypoints.saving import save_again
from safelight.runtime.errors import ConfigError, JobFailed, StartupError, TooLarge, WorkerLost
from safelight.runtime.hub import fingerprint
from safelight.runtime.inputs import Picture
from safelight.runtime.messages import (
    Artifact,
    ErrorInfo,
    Event,
    GenerationRequest,
    InputImage,
    MediaFormat,
    MediaSpec,
    Status,
)

Run = Callable[..., int]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    return fake_server(tmp_path / "artifacts", monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "model")


@pytest.fixture
def run(server: FakeServer, model: str, tmp_path: Path) -> Run:
    return runner(model, tmp_path / "out")


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "p.txt").write_text("a dog\na cat\na cow\n")
    (tmp_path / "state").mkdir()
    return {"prompt_path": str(tmp_path / "p.txt"), "state_dir": str(tmp_path / "state")}


def preempts(server: FakeServer, prompt: str, times: int = 1) -> Callable[[GenerationRequest, str], Event]:
    """A script in which SIGTERM comes while `prompt` runs, which then never ends."""
    sent = 0

    def script(request: GenerationRequest, job: str) -> Event:
        nonlocal sent
        if request.prompt != prompt:
            return server.complete(request, job)
        server.open[job] = request
        if sent < times:
            sent += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return Event(job, 0)

    return script


def preempted(run: Run, server: FakeServer, **flags: Any) -> None:
    """A run that is stopped when its first job is done, its second runs, and its third waits."""
    server.script = preempts(server, "a cat")
    assert run(max_queue=1, drain_grace_s=0.0, **flags) == 75
    server.script, server.drained = server.complete, False
    server.open.clear()
    server.log.clear()


def test_a_preempted_run_exits_with_75_and_resuming_does_the_rest_under_the_same_ids(
    run: Run, server: FakeServer, flags: dict[str, Any], capfd: Any
) -> None:
    preempted(run, server, **flags, seed=None)
    assert "--resume" in capfd.readouterr().err
    assert [request.prompt for _, request, _ in server.submitted] == ["a dog", "a cat"]
    first = {request.prompt: (job, request, attached) for job, request, attached in server.submitted}
    server.submitted.clear()
    assert run(**flags, resume=True, seed=None) == 0
    again = {request.prompt: (job, request, attached) for job, request, attached in server.submitted}
    assert list(again) == ["a cat", "a cow"]
    assert again["a cat"] == first["a cat"], "the same id, the same drawn seed"
    assert again["a cat"][2] is False, "detached: no lease ends it"
    assert len(capfd.readouterr().out.splitlines()) == 3, "all results of the run"
    server.log.clear()
    assert run(**flags, resume=True, seed=None) == 0
    assert server.log == [], "all done: nothing is started"


def test_a_second_sigterm_ends_the_grace_but_still_saves(run: Run, server: FakeServer, flags: dict[str, Any]) -> None:
    server.script = preempts(server, "a cat", times=2)
    assert run(**flags) == 75
    assert server.graces == [30.0, 0.0]
    assert "cancel" not in server.log


def test_a_run_that_ends_within_the_grace_has_succeeded(run: Run, server: FakeServer, flags: dict[str, Any]) -> None:
    def script(request: GenerationRequest, job: str) -> Event:
        if request.prompt == "a cow":
            os.kill(os.getpid(), signal.SIGTERM)
        return server.complete(request, job)

    server.script = script
    assert run(**flags) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_other_signals_save_at_once(
    run: Run, server: FakeServer, flags: dict[str, Any], number: signal.Signals, code: int
) -> None:
    def script(request: GenerationRequest, job: str) -> Event:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal interrupts")

    server.script = script
    assert run(**flags) == code
    assert server.log[-3:] == ["drain 0", "close", "stop"]


def test_sigterm_during_the_start_up_is_a_preemption_too(
    run: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    monkeypatch.setattr(server, "wait_ready", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert run(**flags, resume=True) == 75
    monkeypatch.undo()


def test_resume_without_a_state_dir_is_refused_and_without_a_run_starts_one(
    run: Run, server: FakeServer, flags: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="--state-dir") as refused:
        run(resume=True)
    assert refused.value.param == "resume"
    assert server.log == []
    assert run(**flags, resume=True) == 0


def test_an_unfinished_run_is_not_overwritten_and_a_finished_one_is(
    run: Run, server: FakeServer, flags: dict[str, Any]
) -> None:
    preempted(run, server, **flags)
    with pytest.raises(ConfigError, match="2 of 3 jobs unfinished; add --resume"):
        run(**flags)
    assert run(**flags, resume=True) == 0
    ids = {job for job, _, _ in server.submitted}
    server.submitted.clear()
    assert run(**flags) == 0
    assert len(server.submitted) == 3
    assert not ids & {job for job, _, _ in server.submitted}


def test_a_run_of_other_flags_is_refused(
    run: Run, server: FakeServer, flags: dict[str, Any], tmp_path: Path, model: str
) -> None:
    preempted(run, server, **flags)
    with pytest.raises(ConfigError, match="seed 7 in job 1, this command 8"):
        run(**flags, resume=True, seed=8)
    with pytest.raises(ConfigError, match="output_format 'png' in job 1, this command 'webp'"):
        run(**flags, resume=True, output_format="webp")
    with pytest.raises(ConfigError, match="backend safelight, this command diffusers"):
        run(**flags, resume=True, backend="diffusers")
    (tmp_path / "p.txt").write_text("a dog\na bird\na cow\n")
    with pytest.raises(ConfigError, match="prompt 'a cat' in job 2, this command 'a bird'"):
        run(**flags, resume=True)
    (tmp_path / "p.txt").write_text("a dog\n")
    with pytest.raises(ConfigError, match="3 jobs, this command 1"):
        run(**flags, resume=True)
    (tmp_path / "p.txt").write_text("a dog\na cat\na cow\n")
    Path(model, "text_encoder", "config.json").write_text('{"d_model": 16, "num_layers": 1, "other": 1}')
    with pytest.raises(ConfigError, match="has model "):
        run(**flags, resume=True)
    assert server.log == []


def test_a_picture_may_move_but_not_change(tmp_path: Path) -> None:
    def job_of(name: str, content: str) -> Job:
        picture = Picture(InputImage(content * 64, 8, 8), b"")
        params = SamplingParams(prompt="a", seed=1, image_path=(name,))
        return Job(1, 1, params, MediaSpec(MediaFormat.PNG), 192, (picture,))

    first = KeptRun(tmp_path, resume=False)
    first.match({}, [job_of("here.png", "a")])
    first.begin()
    KeptRun(tmp_path, resume=True).match({}, [job_of("there.png", "a")])
    with pytest.raises(ConfigError, match="image_path"):
        KeptRun(tmp_path, resume=True).match({}, [job_of("here.png", "b")])


def test_what_changes_the_pictures_of_diffusers_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "model"
    root.mkdir()
    (root / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    spec = identify(root)
    plain = backend_settings(ServerArgs(), spec)
    assert plain["backend"] == "diffusers"
    changes: list[dict[str, Any]] = [
        {"vae_tiling": True}, {"vae_slicing": True}, {"diffusers_attention_backend": "native"},
        {"diffusers_kwargs": {"clip_skip": 1}},
    ]  # fmt: skip
    assert all(backend_settings(ServerArgs(**change), spec) != plain for change in changes)


def test_a_failed_job_stays_failed_and_a_lost_server_is_no_failure_of_the_job(
    run: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    def script(request: GenerationRequest, job: str) -> Event:
        if request.prompt == "a dog":
            return Event(job, 0, status=Status.FAILED, error=ErrorInfo("job_failed", "out of memory"))
        return server.complete(request, job)

    submit = server.submit

    def refuse(request: GenerationRequest, **options: Any) -> str:
        if request.prompt == "a cat":
            raise TooLarge("it can never fit")
        if request.prompt == "a cow":
            raise WorkerLost("no answer")
        return submit(request, **options)

    server.script = script
    monkeypatch.setattr(server, "submit", refuse)
    assert run(**flags) == 1
    monkeypatch.setattr(server, "submit", submit)
    server.submitted.clear()
    assert run(**flags, resume=True) == 1
    assert [request.prompt for _, request, _ in server.submitted] == ["a cow"]


def test_a_torn_result_and_nonsense_in_the_folder(run: Run, server: FakeServer, flags: dict[str, Any]) -> None:
    assert run(**flags) == 0
    state = Path(flags["state_dir"])
    results = state / "generate.results.jsonl"
    results.write_bytes(results.read_bytes()[:-20])
    server.submitted.clear()
    assert run(**flags, resume=True) == 0
    assert [request.prompt for _, request, _ in server.submitted] == ["a cow"], "asked again, the journal knows its end"
    assert len([json.loads(line) for line in results.read_text().splitlines()[-1:]]) == 1
    for nonsense in ("{", "[]", '{"version": 1}', '{"version": 9, "settings": {}, "jobs": []}'):
        (state / "generate.json").write_text(nonsense)
        with pytest.raises(ConfigError, match=r"generate\.json"):
            run(**flags, resume=True)


def test_a_full_disk_ends_the_run_with_its_reason(
    run: Run, server: FakeServer, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    def script(request: GenerationRequest, job: str) -> Event:
        results = Path(flags["state_dir"]) / "generate.results.jsonl"
        results.mkdir(exist_ok=True)  # what no append succeeds on
        return server.complete(request, job)

    server.script = script
    with pytest.raises(StartupError, match="cannot be written"):
        run(**flags)
    assert server.log[-1] == "stop"


def made(folder: Path, content: bytes, *, frames: bytes | None = None) -> Artifact:
    folder.mkdir(exist_ok=True)
    (folder / "made.png").write_bytes(content)
    if frames is not None:
        (folder / "made.npy").write_bytes(frames)
    digest = hashlib.sha256(content).hexdigest()
    return Artifact(0, str(folder / "made.png"), "image/png", len(content), digest,
                    str(folder / "made.npy") if frames is not None else None)  # fmt: skip


@pytest.mark.parametrize("moved", ["nothing", "the picture", "the picture and the frames", "a link of the picture"])
def test_a_result_whose_saving_was_interrupted_is_saved_once(tmp_path: Path, moved: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    (target / "a.png").write_bytes(b"another")
    artifact = made(source, b"picture", frames=b"frames")
    if moved != "nothing":
        os.link(source / "made.png", target / "a-2.png")
        if moved != "a link of the picture":
            (source / "made.png").unlink()
    if moved == "the picture and the frames":
        (source / "made.npy").rename(target / "a-2.npy")
    assert save_again(artifact, target, "a.png", set()) == (target / "a-2.png", target / "a-2.npy")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        "a.png": b"another", "a-2.png": b"picture", "a-2.npy": b"frames",
    }  # fmt: skip
    assert not list(source.iterdir())


def test_equal_pictures_of_two_jobs_are_two_files_and_a_lost_one_is_said(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    saved, _ = save_again(made(tmp_path / "source", b"picture"), target, "a.png", set())
    second, _ = save_again(made(tmp_path / "source", b"picture"), target, "a.png", {saved.absolute()})
    assert second == target / "a-2.png"
    lost = Artifact(0, str(tmp_path / "gone.png"), "image/png", 3, "0")
    with pytest.raises(JobFailed, match="cannot be saved"):
        save_again(lost, target, "a.png", set())


def test_slices_share_a_prompt_file_out(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\n\nb\nc\n{oops\n")

    def prompts(piece: str) -> list[str]:
        files = GenerateArgs(prompt_path=str(path), prompt_slice=piece)
        return [params.prompt for _, params in read_jobs(SamplingParams(), files)]

    assert (prompts("1/3"), prompts("2/3")) == (["b"], ["c"])
    assert prompts("7/9") == []
    with pytest.raises(ConfigError, match="line 5"):
        prompts("0/3")


@pytest.mark.parametrize("piece", ["", "1", "3/3", "4/3", "0/0", "-1/3", "1/3/5", "a/b", "1 /3"])
def test_a_slice_that_is_none_is_refused(piece: str) -> None:
    with pytest.raises(ConfigError, match="I/N") as refused:
        GenerateArgs(prompt_path="x", prompt_slice=piece)
    assert refused.value.param == "prompt_slice"
    with pytest.raises(ConfigError, match="--prompt-path"):
        GenerateArgs(prompt_slice="0/2")


def test_a_slice_without_jobs_succeeds_and_starts_nothing(run: Run, server: FakeServer, flags: Any, capfd: Any) -> None:
    assert run(**flags, prompt_slice="5/8") == 0
    assert server.log == []
    assert "--prompt-slice 5/8: no job" in capfd.readouterr().err


def test_a_fingerprint_tells_models_apart_wherever_they_are(tmp_path: Path) -> None:
    def folder(name: str, weights: bytes) -> Path:
        (tmp_path / name / "vae").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}")
        (tmp_path / name / "vae" / "w.safetensors").write_bytes(weights)
        return tmp_path / name

    size = 3 << 20
    first = fingerprint(folder("a", bytes(size)))
    assert fingerprint(folder("b", bytes(size))) == first
    (tmp_path / "b" / "pipeline.py").write_text("")
    assert fingerprint(tmp_path / "b") != first
    others = [bytes(size - 1), b"\1" + bytes(size - 1), bytes(size - 1) + b"\1"]
    assert len({first, *(fingerprint(folder(str(i), other)) for i, other in enumerate(others))}) == 4
