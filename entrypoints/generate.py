"""`safelight generate`: check every job, start the processes, run the jobs, save the results, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from safelight.configs.backend import backend_settings
from safelight.configs.families import FAMILIES, ModelSpec, identify
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.client import Client, error_of
from safelight.entrypoints.interrupts import PREEMPTED, Interrupted, Interrupts
from safelight.entrypoints.jobs import Job, check_jobs, read_jobs, requests, unknown_words
from safelight.entrypoints.kept_run import KeptRun
from safelight.entrypoints.model_path import find_root, with_local_vae
from safelight.entrypoints.previews import Preview
from safelight.entrypoints.progress import JsonReporter, PlainReporter, Reporter
from safelight.entrypoints.saving import file_name, prepare_folder, preview_name, save, save_again, save_data
from safelight.runtime import hub, logs
from safelight.runtime.errors import ConfigError, JobFailed, Overloaded, SafelightError, StartupError, WorkerLost
from safelight.runtime.launch.devices import resolve_device
from safelight.runtime.launch.specs import check_layout
from safelight.runtime.launch.supervisor import Supervisor
from safelight.runtime.messages import Event, GenerationRequest, Status
from safelight.runtime.ulid import new_ulid

_POLL_S = 0.5
_CANCEL_S = 1.0
_TRY_S, _TRIES = 1.0, 60  # a scheduler that is started again answers well within


def run(params: SamplingParams, files: GenerateArgs, args: ServerArgs) -> int:
    """The exit code: 0, 1 when a job failed, 75 and 130 after signals. Raises SafelightError when nothing was run."""
    if files.resume and args.state_dir is None:
        raise ConfigError("--resume needs the --state-dir of the run that it goes on with", param="resume")
    if args.state_dir is not None:  # the journal has paths below it
        args = dataclasses.replace(args, state_dir=str(Path(args.state_dir).absolute()))
    logs.configure("generate", args.log_level)
    reporter = make_reporter(files.json)
    try:
        with Interrupts() as interrupts:
            return _Run(files, args, reporter).run(params, interrupts)
    except Interrupted as interrupted:
        if args.state_dir is None:
            reporter.note("stopped; unfinished jobs were cancelled")
            return interrupted.exit_code
        reporter.note(f"stopped; --resume with --state-dir {args.state_dir} goes on with what is unfinished")
        return PREEMPTED if interrupted.number == signal.SIGTERM else interrupted.exit_code
    finally:
        reporter.close()


def make_reporter(machine: bool) -> Reporter:
    """The reporter for this process's stdout and stderr."""
    if machine:
        return JsonReporter(sys.stdout)
    if sys.stderr.isatty():
        from safelight.entrypoints.live import LiveReporter

        return LiveReporter(sys.stderr, sys.stdout)
    return PlainReporter(sys.stderr, sys.stdout)


class _Run:
    """One `generate`: what was saved and what failed so far."""

    def __init__(self, files: GenerateArgs, args: ServerArgs, reporter: Reporter) -> None:
        self._files, self._args, self._reporter = files, args, reporter
        self._folder = Path(files.output_path)
        self._paths: list[Path] = []
        self._failed = 0
        self._kept = KeptRun(Path(args.state_dir), files.resume) if args.state_dir else None

    def run(self, params: SamplingParams, interrupts: Interrupts) -> int:
        """Everything up to the exit code. Raises Interrupted after the processes have stopped."""
        started = time.monotonic()
        spec, args, jobs = self._check(params)
        jobs = [job for job in jobs if not self._ended_before(job)]
        if jobs:
            server = Supervisor(args, spec.root, max(job.chunk_bytes for job in jobs))
            try:
                server.start()
                made = list(requests(spec, jobs, server.inputs))  # while the processes start
                server.wait_ready(args.startup_timeout_s, lambda phase: self._reporter.phase(f"workers: {phase}"))
                interrupts.drain_on_terminate(always=self._kept is not None)
                self._follow(server, deque(zip(jobs, made, strict=True)), interrupts)
            finally:
                interrupts.then_call(lambda: _kill(server))
                server.stop()
        self._reporter.finish(self._paths, self._failed, time.monotonic() - started)
        return 1 if self._failed else 0

    def _check(self, params: SamplingParams) -> tuple[ModelSpec, ServerArgs, list[Job]]:
        """All that can be wrong is found here, before any process starts. Raises SafelightError."""
        found = read_jobs(params, self._files)
        if self._kept:
            found = self._kept.seeded(found)
        root = find_root(self._args, self._reporter.phase, quiet=self._files.json)
        args = with_local_vae(self._args, quiet=self._files.json)
        spec = identify(root, args.backend, args.trust_remote_code)
        self._reporter.phase(f"backend: {FAMILIES[spec.family].backend} ({spec.reason})")
        check_layout(args, root)
        jobs = check_jobs(spec, found, self._files, vae_path=args.vae_path)
        if self._kept:
            self._kept.match(_settings(spec, args), jobs)
        if not jobs:
            self._reporter.note(f"note: --prompt-slice {self._files.prompt_slice}: no job of the file is in it")
        if self._files.save_output:
            prepare_folder(self._folder)
        unknown = {word for job in jobs for word in unknown_words(root, job.params.prompt)}
        if unknown:
            names = ", ".join(sorted(unknown)[:5])
            self._reporter.note(f"note: the built-in model knows simple subjects only; not among its words: {names}")
        return spec, args, jobs

    def _follow(
        self, server: Supervisor, waiting: deque[tuple[Job, GenerationRequest]], interrupts: Interrupts
    ) -> None:
        """Submits the jobs, at most as many at once as the queue takes, and follows them to their ends.

        A SIGTERM drains: nothing more is submitted, what was submitted may finish within --drain-grace-s.
        """
        running: dict[str, Job] = {}
        told, deadline, over = 0, 0.0, False  # SIGTERMs that were answered
        with Client(server.endpoints) as client:
            try:
                if self._kept:
                    _answered(server, lambda: client.status(_TRY_S))  # so the journal is this server's
                    self._kept.begin()
                while (waiting or running) and not over:
                    if interrupts.terminations > told:
                        grace = 0.0 if told else self._args.drain_grace_s
                        told, deadline = interrupts.terminations, time.monotonic() + grace
                        server.begin_drain(grace)
                    while not told and waiting and len(running) < self._args.max_queue:
                        self._submit(client, server, running, *waiting.popleft())
                    events = client.poll(_POLL_S)
                    for event in events:
                        self._note(running, event)
                    if server.failure:
                        raise server.failure
                    ended = server.drained and not events if self._kept else time.monotonic() > deadline
                    over = told > 0 and (not running or ended)
                if told and (waiting or running or not self._kept):
                    raise Interrupted(signal.SIGTERM)
            except Interrupted:
                self._leave(client, server, running)
                raise

    def _submit(
        self, client: Client, server: Supervisor, running: dict[str, Job], job: Job, request: GenerationRequest
    ) -> None:
        """Submits a job under one id until that is answered; a kept run's goes on without a client's lease."""
        name, attached = (self._kept.id_of(job), False) if self._kept else (new_ulid(), True)
        try:
            _answered(server, lambda: client.submit(request, job=name, attached=attached, timeout_s=_TRY_S))
            running[name] = job
        except StartupError:
            raise
        except SafelightError as error:
            self._end(job, error, [])

    def _leave(self, client: Client, server: Supervisor, running: dict[str, Job]) -> None:
        """Before the processes stop: jobs of a kept run are saved where they stand, others are cancelled."""
        if self._kept:
            server.drain(0.0)
            return
        with contextlib.suppress(SafelightError):
            for name in running:
                client.cancel(name, _CANCEL_S)

    def _note(self, running: dict[str, Job], event: Event | Preview) -> None:
        job = running[event.job]
        if isinstance(event, Preview):
            self._save_preview(job, event)
            return
        if event.progress:
            self._reporter.progress(job, event.progress)
        if event.status is None:
            return
        error: SafelightError | None = None
        paths: list[Path] = []
        if event.status is not Status.COMPLETED:
            error = error_of(event.error) if event.error else JobFailed(f"the job ended as {event.status}")
        elif self._files.save_output:
            try:
                paths = self._save(job, event)
            except JobFailed as failed:
                error = failed
        del running[event.job]
        self._end(job, error, paths)

    def _save(self, job: Job, event: Event) -> list[Path]:
        paths: list[Path] = []
        for artifact in event.artifacts:
            name = file_name(self._files, job.params, job.media.format.value, artifact.index)
            if self._kept and self._kept.resumed:
                saved, frames = save_again(artifact, self._folder, name, self._kept.saved_paths() | {*paths})
            else:
                saved, frames = save(artifact, self._folder, name)
            paths += [saved, frames] if frames else [saved]
        return paths

    def _save_preview(self, job: Job, preview: Preview) -> None:
        """The job goes on if it cannot be saved."""
        try:
            path = save_data(preview.data, self._folder, preview_name(self._files, job.params, preview))
        except JobFailed as error:
            self._reporter.note(f"note: {error.message}")
        else:
            self._reporter.preview(job, preview, path)

    def _end(self, job: Job, error: SafelightError | None, paths: list[Path]) -> None:
        if self._kept and not isinstance(error, Overloaded | WorkerLost):  # which are not the job's own
            self._kept.record(job, error, paths)
        self._tell(job, error, paths)

    def _ended_before(self, job: Job) -> bool:
        """Whether a job ended in the run that is resumed; then that is told again."""
        result = self._kept.result_of(job) if self._kept else None
        if result is not None:
            self._tell(job, result.raised(), [Path(path) for path in result.paths])
        return result is not None

    def _tell(self, job: Job, error: SafelightError | None, paths: list[Path]) -> None:
        self._failed += error is not None
        self._paths += paths
        self._reporter.ended(job, error, paths)


def _answered(server: Supervisor, ask: Callable[[], object]) -> None:
    """Asks until answered; a server that has failed will not answer."""
    for _ in range(_TRIES - 1):
        try:
            ask()
        except WorkerLost:
            if server.failure:
                raise server.failure from None
        else:
            return
    ask()


def _settings(spec: ModelSpec, args: ServerArgs) -> dict[str, str]:
    """What else the pictures depend on: a run that goes on must have the same."""
    found = {"model": hub.fingerprint(spec.root), "device": resolve_device(args.device, 1)}
    found |= {"dit_precision": args.dit_precision, "vae_precision": args.vae_precision}
    found |= {"vae": hub.fingerprint(Path(args.vae_path)) if args.vae_path else "of the model"}
    return found | backend_settings(args, spec)


def _kill(server: Supervisor) -> None:
    """A second Ctrl-C: the processes end at once, and `stop` only has to clean up."""
    for pid in server.pids().values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
