"""`safelight generate`: check every job, start the processes, run the jobs, save the results, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path

from safelight.configs.families import ModelSpec, identify
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.client import Client, error_of
from safelight.entrypoints.interrupts import Interrupted, Interrupts
from safelight.entrypoints.jobs import Job, check_jobs, read_jobs, requests, unknown_words
from safelight.entrypoints.progress import JsonReporter, PlainReporter, Reporter
from safelight.entrypoints.saving import file_name, prepare_folder, save
from safelight.runtime import hub, logs
from safelight.runtime.errors import JobFailed, SafelightError, StartupError, WorkerLost
from safelight.runtime.launch.specs import check_layout
from safelight.runtime.launch.supervisor import Supervisor
from safelight.runtime.messages import Event, GenerationRequest, Status
from safelight.runtime.ulid import new_ulid

_POLL_S = 0.5
_CANCEL_S = 1.0
_SUBMIT_TRIES = 60  # of a second: a scheduler that is started again answers well within


def run(params: SamplingParams, files: GenerateArgs, args: ServerArgs) -> int:
    """The exit code: 0, 1 when a job failed, 130 after Ctrl-C. Raises SafelightError when nothing could be run."""
    logs.configure("generate", args.log_level)
    reporter = make_reporter(files.json)
    try:
        with Interrupts() as interrupts:
            return _Run(files, args, reporter).run(params, interrupts)
    except Interrupted as interrupted:
        reporter.note("stopped; unfinished jobs were cancelled")
        return interrupted.exit_code
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

    def run(self, params: SamplingParams, interrupts: Interrupts) -> int:
        """Everything up to the exit code. Raises Interrupted after the processes have stopped."""
        started = time.monotonic()
        spec, args, jobs = self._check(params)
        server = Supervisor(args, spec.root, max(job.chunk_bytes for job in jobs))
        try:
            server.start()
            made = list(requests(spec, jobs))  # while the processes start
            server.wait_ready(args.startup_timeout_s, lambda phase: self._reporter.phase(f"workers: {phase}"))
            interrupts.drain_on_terminate()
            self._follow(server, deque(zip(jobs, made, strict=True)), interrupts)
        finally:
            interrupts.then_call(lambda: _kill(server))
            server.stop()
        self._reporter.finish(self._paths, self._failed, time.monotonic() - started)
        return 1 if self._failed else 0

    def _check(self, params: SamplingParams) -> tuple[ModelSpec, ServerArgs, list[Job]]:
        """All that can be wrong is found here, before any process starts. Raises SafelightError."""
        found = read_jobs(params, self._files)
        root = hub.resolve(self._args.model_path, quiet=self._files.json)
        args = self._args
        if args.vae_path is not None:
            args = dataclasses.replace(
                args, vae_path=str(hub.resolve(args.vae_path, "vae_path", quiet=self._files.json))
            )
        spec = identify(root)
        check_layout(args, root)
        jobs = check_jobs(spec, found, self._files)
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
        deadline: float | None = None
        with Client(server.endpoints) as client:
            try:
                while waiting or running:
                    if interrupts.draining and deadline is None:
                        deadline = time.monotonic() + self._args.drain_grace_s
                        waiting.clear()
                        server.begin_drain(self._args.drain_grace_s)
                    if deadline is not None and time.monotonic() > deadline:
                        raise Interrupted(signal.SIGTERM)
                    while waiting and len(running) < self._args.max_queue:
                        job, request = waiting.popleft()
                        try:
                            running[_submit(client, server, request)] = job
                        except StartupError:
                            raise
                        except SafelightError as error:
                            self._end(job, error, [])
                    for event in client.poll(_POLL_S):
                        self._note(running, event)
                    if server.failure:
                        raise server.failure
                if interrupts.draining:
                    raise Interrupted(signal.SIGTERM)
            except Interrupted:
                with contextlib.suppress(SafelightError):
                    for name in running:
                        client.cancel(name, _CANCEL_S)
                raise

    def _note(self, running: dict[str, Job], event: Event) -> None:
        job = running[event.job]
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
        paths = []
        for artifact in event.artifacts:
            name = file_name(self._files, job.params, job.media.format.value, artifact.index)
            saved, frames = save(artifact, self._folder, name)
            paths += [saved, frames] if frames else [saved]
        return paths

    def _end(self, job: Job, error: SafelightError | None, paths: list[Path]) -> None:
        self._failed += error is not None
        self._paths += paths
        self._reporter.ended(job, error, paths)


def _submit(client: Client, server: Supervisor, request: GenerationRequest) -> str:
    """Submits under one id until answered; a server that has failed will not answer."""
    job = new_ulid()
    for _ in range(_SUBMIT_TRIES - 1):
        try:
            return client.submit(request, job=job, timeout_s=1.0)
        except WorkerLost:
            if server.failure:
                raise server.failure from None
    return client.submit(request, job=job, timeout_s=1.0)


def _kill(server: Supervisor) -> None:
    """A second Ctrl-C: the processes end at once, and `stop` only has to clean up."""
    for pid in server.pids().values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
