"""The flow of `generate` without processes: a fake server behind it, and a model of configs only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints import generate
from safelight.entrypoints.jobs import Job
from safelight.entrypoints.previews import Preview
from safelight.runtime.errors import StartupError, TooLarge
from safelight.runtime.messages import Artifact, Event, GenerationRequest, Status


class FakeServer:
    """Supervisor and client in one: each submitted job ends as `script(request)` says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, list[str]()
        self.script: Callable[[GenerationRequest, str], Event] = self.complete
        self.preview_steps = tuple[int, ...]()
        self.failure: StartupError | None = None
        self.ready_error: StartupError | None = None
        self.open: dict[str, GenerationRequest] = {}
        self.most_open = 0
        self.args: ServerArgs | None = None
        self.slot_bytes = 0
        self.drained = False
        self.graces = list[float]()
        self.submitted = list[tuple[str, GenerationRequest, bool]]()

    def complete(self, request: GenerationRequest, job: str) -> Event:
        path = self.folder / f"{job}.png"
        path.write_bytes(b"picture")
        digest = hashlib.sha256(b"picture").hexdigest()
        return Event(job, 0, status=Status.COMPLETED, artifacts=(Artifact(0, str(path), "image/png", 7, digest),))

    # the supervisor
    endpoints = None
    inputs = None

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

    def begin_drain(self, grace_s: float) -> None:
        self.graces.append(grace_s)
        self.drained = grace_s == 0

    def drain(self, grace_s: float) -> bool:
        self.log.append(f"drain {grace_s:g}")
        return True

    # the client
    def status(self, timeout_s: float) -> None:
        """Answers."""

    def submit(self, request: GenerationRequest, job: str, attached: bool, timeout_s: float) -> str:
        self.log.append(f"submit {request.prompt}")
        self.submitted.append((job, request, attached))
        if request.prompt == "huge":
            raise TooLarge("it can never fit")
        self.open[job] = request
        self.most_open = max(self.most_open, len(self.open))
        return job

    def poll(self, timeout_s: float) -> list[Event | Preview]:
        jobs = [] if self.drained else list(self.open)
        events: list[Event | Preview] = []
        for job in jobs:
            events += [*self._previews(job), self.script(self.open.pop(job), job)]
        return events

    def _previews(self, job: str) -> list[Preview]:
        return [Preview(job, 0, n, step, 8, 8, "image/png", b"preview") for n, step in enumerate(self.preview_steps)]

    def cancel(self, job: str, timeout_s: float) -> None:
        self.log.append("cancel")

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append("close")


def fake_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """`generate` starts this and talks to it."""
    fake = FakeServer(folder)
    fake.folder.mkdir()

    def supervise(args: ServerArgs, root: Path, slot_bytes: int) -> FakeServer:
        fake.args, fake.slot_bytes = args, slot_bytes
        return fake

    def tokenized(spec: Any, jobs: list[Job], store: Any) -> list[GenerationRequest]:
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


def write_model(folder: Path) -> str:
    """The configs of a model; its path."""
    files = {
        "model_index.json": {"_class_name": "WanPipeline"},
        "transformer/config.json": {
            "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "in_channels": 16, "ffn_dim": 32,
            "text_dim": 16,
        },
        "vae/config.json": {"_class_name": "AutoencoderKLWan", "dim_mult": [1, 2, 4, 4], "base_dim": 8},
        "text_encoder/config.json": {"d_model": 16, "num_layers": 1},
        "scheduler/scheduler_config.json": {"_class_name": "UniPCMultistepScheduler"},
    }  # fmt: skip
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return str(folder)


def runner(model: str, out: Path) -> Callable[..., int]:
    """Runs `generate` with fields of its configs as keywords."""

    def call(prompt: str = "a dog", **options: Any) -> int:
        names = ("max_queue", "model_path", "state_dir", "drain_grace_s", "backend")
        server_options = {name: options.pop(name) for name in names if name in options}
        seed, previews = options.pop("seed", 7), options.pop("previews", 0)
        files = GenerateArgs(**{"output_path": str(out), **options})
        params = SamplingParams(prompt="" if files.prompt_path else prompt, seed=seed, previews=previews)
        return generate.run(params, files, ServerArgs(**{"model_path": model, **server_options}))

    return call
