"""The run of a state directory: what `generate --state-dir` writes down so that `--resume` can go on with it.

`generate.json` holds the jobs with their ids and drawn seeds, and is written before the first job is submitted;
`generate.results.jsonl` has a line for each job that ended, written after its files were saved. What became of the
others is in the journal: a job submitted again under its id is the same job.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.jobs import Job
from safelight.runtime.errors import ConfigError, SafelightError, StartupError, from_code
from safelight.runtime.messages import ErrorInfo, InputImage, MediaSpec
from safelight.runtime.ulid import new_ulid

_VERSION = 1


class KeptJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    params: SamplingParams
    media: MediaSpec
    images: tuple[InputImage, ...] = ()


class RunFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    settings: dict[str, str]  # what changes the pictures, beside the jobs themselves
    jobs: tuple[KeptJob, ...]


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end of a job: its saved files, or why it failed."""

    job: str
    paths: tuple[str, ...] = ()
    error: ErrorInfo | None = None

    def raised(self) -> SafelightError | None:
        return from_code(self.error.code, self.error.message, self.error.param) if self.error else None


class KeptRun:
    """`KeptRun(folder, resume)`, then `seeded`, `match`, `begin`, and `record` for every job that ends.

    Raises ConfigError when `folder` holds an unfinished run and `resume` is not set, or what cannot be read.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self._file, self._results_file = folder / "generate.json", folder / "generate.results.jsonl"
        self._seen = self._earlier = _read(self._file)
        self._results = {result.job: result for result in _results(self._results_file)}
        self._run: RunFile | None = None
        if self._earlier is None or resume:
            return
        if left := sum(job.id not in self._results for job in self._earlier.jobs):
            raise ConfigError(
                f"--state-dir: {folder} holds a run with {left} of {len(self._earlier.jobs)} jobs unfinished; add "
                "--resume to go on with it, or give another folder",
                param="state_dir",
            )
        self._earlier = None

    @property
    def resumed(self) -> bool:
        return self._earlier is not None

    def seeded(self, found: Sequence[tuple[str, SamplingParams]]) -> list[tuple[str, SamplingParams]]:
        """The jobs with the seeds that the earlier run drew for those without one. Raises ConfigError."""
        if self._earlier is None:
            return list(found)
        if len(found) != len(self._earlier.jobs):
            raise _other_run(f"{len(self._earlier.jobs)} jobs", f"{len(found)}")
        return [
            (where, dataclasses.replace(params, seed=kept.params.seed if params.seed is None else params.seed))
            for (where, params), kept in zip(found, self._earlier.jobs, strict=True)
        ]

    def match(self, settings: Mapping[str, str], jobs: Sequence[Job]) -> None:
        """Raises ConfigError unless these are the jobs of the earlier run; without one, gives each an id."""
        if self._earlier is None:
            made = tuple(KeptJob(new_ulid(), job.params, job.media, _images(job)) for job in jobs)
            self._run = RunFile(_VERSION, dict(settings), made)
            return
        for name, value in settings.items():
            if (before := self._earlier.settings.get(name)) != value:
                raise _other_run(f"{name} {before}", value)
        for job, kept in zip(jobs, self._earlier.jobs, strict=True):
            had, has = _values(kept.params, kept.media, kept.images), _values(job.params, job.media, _images(job))
            for name in has:
                if had[name] != has[name]:
                    raise _other_run(f"{name} {had[name]!r} in job {job.number}", repr(has[name]))
        self._run = self._earlier

    def begin(self) -> None:
        """Call when the journal is this server's, and before a job is submitted. Raises ConfigError, StartupError."""
        assert self._run is not None, "matched"
        if _read(self._file) != self._seen:
            raise ConfigError(f"{self._file} was changed by another run meanwhile; start again", param="resume")
        if self.resumed:
            return
        try:
            _write_durably(self._file, msgspec.json.format(msgspec.json.encode(self._run)))
            self._results_file.unlink(missing_ok=True)
        except OSError as failure:
            raise StartupError(f"{self._file} cannot be written: {failure}; check --state-dir") from failure

    def id_of(self, job: Job) -> str:
        assert self._run is not None, "matched"
        return self._run.jobs[job.number - 1].id

    def result_of(self, job: Job) -> Result | None:
        """How a job ended in the earlier run; None for those that are still to do."""
        return self._results.get(self.id_of(job))

    def record(self, job: Job, error: SafelightError | None, paths: Sequence[Path]) -> None:
        """Notes the end of a job, durably: it will not be done again. Raises StartupError."""
        info = ErrorInfo(error.code, error.message, error.param) if error else None
        result = Result(self.id_of(job), tuple(str(path.absolute()) for path in paths), info)
        self._results[result.job] = result
        try:
            with self._results_file.open("ab") as file:
                file.write(b"\n" + msgspec.json.encode(result))  # what a killed run left of a line is a line by itself
                file.flush()
                os.fsync(file.fileno())
        except OSError as failure:
            raise StartupError(f"{self._results_file} cannot be written: {failure}; is the disk full?") from failure

    def saved_paths(self) -> frozenset[Path]:
        """Files that belong to jobs which have ended."""
        return frozenset(Path(path) for result in self._results.values() for path in result.paths)


def _images(job: Job) -> tuple[InputImage, ...]:
    return tuple(picture.ref for picture in job.images)


def _values(params: SamplingParams, media: MediaSpec, images: tuple[InputImage, ...]) -> dict[str, Any]:
    """What makes one job another; a picture is the same wherever it lies."""
    return dataclasses.asdict(params) | {
        "output_format": media.format.value, "output_quality": media.quality, "return_frames": media.with_frames,
        "image_path": ", ".join(image.sha256 for image in images),
    }  # fmt: skip


def _other_run(before: str, now: str) -> ConfigError:
    return ConfigError(
        f"--resume: the run in --state-dir has {before}, this command {now}; give the flags of that run, or another "
        "folder to start a new one",
        param="resume",
    )


def _read(path: Path) -> RunFile | None:
    try:
        run = msgspec.json.decode(path.read_bytes(), type=RunFile)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, SafelightError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give another --state-dir", param="state_dir") from error
    if run.version != _VERSION:
        raise ConfigError(
            f"{path} has version {run.version}, this program reads {_VERSION}; give another --state-dir",
            param="state_dir",
        )
    return run


def _results(path: Path) -> list[Result]:
    """The whole lines; a job whose line is torn is asked for again, and the journal knows its end."""
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}; give another --state-dir", param="state_dir") from error
    for line in lines:
        try:
            found.append(msgspec.json.decode(line, type=Result))
        except msgspec.MsgspecError:
            continue
    return found


def _write_durably(path: Path, data: bytes) -> None:
    """Whole after a crash, or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
