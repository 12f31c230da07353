"""Moves finished files to where the user wants them: whole or not at all, and never over another file."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path

from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.previews import Preview
from safelight.runtime.errors import ConfigError, JobFailed
from safelight.runtime.messages import Artifact

_EXTENSIONS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "mp4": ".mp4", "npy": ".npy"}
_SLUG_LENGTH = 60
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def prepare_folder(folder: Path) -> None:
    """Makes the output folder. Raises ConfigError when nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--output-path: {folder} cannot be written to: {error}", param="output_path") from error


def file_name(files: GenerateArgs, params: SamplingParams, format_name: str, index: int) -> str:
    """The name of output `index`: --output-file-name, or made of prompt, seed and index."""
    extension = _EXTENSIONS[format_name]
    outputs = params.num_outputs_per_prompt or 1
    if files.output_file_name:
        stem, suffix = os.path.splitext(files.output_file_name)
        if suffix.lower() not in (*_EXTENSIONS.values(), ".jpeg"):
            stem, suffix = files.output_file_name, extension
        return f"{stem}-{index}{suffix}" if outputs > 1 else stem + suffix
    slug = re.sub(r"[^\w]+", "-", params.prompt.lower()).strip("-_")[:_SLUG_LENGTH].strip("-") or "untitled"
    return f"{slug}-{params.seed}" + (f"-{index}" if outputs > 1 else "") + extension


def preview_name(files: GenerateArgs, params: SamplingParams, preview: Preview) -> str:
    """The name of a preview: that of its output, with the step."""
    stem, _ = os.path.splitext(file_name(files, params, "png", preview.index))
    return f"{stem}-step-{preview.step}{_EXTENSIONS[preview.media_type.removeprefix('image/')]}"


def save_data(data: bytes, folder: Path, name: str) -> Path:
    """Writes a small file, whole or not at all; a taken name gets a number. Raises JobFailed."""
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".safelight-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o666 & ~_umask())
            return _claim(Path(temporary), folder, name)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise JobFailed(f"{name} cannot be saved in {folder}: {error}") from error


def save(artifact: Artifact, folder: Path, name: str) -> tuple[Path, Path | None]:
    """Moves an artifact, and its raw frames, to `folder`; a taken name gets a number. Raises JobFailed."""
    try:
        saved = _move(Path(artifact.path), folder, name)
        frames = artifact.frames_path
        return saved, _move(Path(frames), folder, saved.stem + ".npy") if frames else None
    except OSError as error:
        raise JobFailed(f"the result cannot be saved in {folder}: {error}") from error


def save_again(artifact: Artifact, folder: Path, name: str, taken: Set[Path]) -> tuple[Path, Path | None]:
    """`save` after a run that may have been killed in the middle of it: what it saved already is found, not doubled.

    `taken` are files of other results. Raises JobFailed.
    """
    saved = next((p for p in _present(folder, name) if p.absolute() not in taken and _is(p, artifact)), None)
    if saved is None:
        return save(artifact, folder, name)
    try:
        Path(artifact.path).unlink(missing_ok=True)
        if artifact.frames_path is None:
            return saved, None
        source, frames = Path(artifact.frames_path), saved.with_suffix(".npy")
        if source.exists() and frames.exists() and filecmp.cmp(source, frames, shallow=False):
            source.unlink()
        return saved, frames if not source.exists() else _move(source, folder, frames.name)
    except OSError as error:
        raise JobFailed(f"the result cannot be saved in {folder}: {error}") from error


def _present(folder: Path, name: str) -> Iterator[Path]:
    return itertools.takewhile(Path.exists, (folder / candidate for candidate in _names(name)))


def _is(path: Path, artifact: Artifact) -> bool:
    with path.open("rb") as file:
        return (
            path.stat().st_size == artifact.nbytes
            and hashlib.file_digest(file, "sha256").hexdigest() == artifact.sha256
        )


def _names(name: str) -> Iterator[str]:
    stem, suffix = os.path.splitext(name)
    yield name
    number = 2
    while True:
        yield f"{stem}-{number}{suffix}"
        number += 1


def _move(source: Path, folder: Path, name: str) -> Path:
    """Same file system: under its new name at once. Another one: a synced copy in the folder, then its name."""
    if source.stat().st_dev == folder.stat().st_dev:
        source.chmod(0o666 & ~_umask())
        return _claim(source, folder, name)
    handle, copy = tempfile.mkstemp(dir=folder, prefix=".safelight-")
    try:
        with os.fdopen(handle, "wb") as file, source.open("rb") as content:
            shutil.copyfileobj(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(copy, 0o666 & ~_umask())
        target = _claim(Path(copy), folder, name)
    finally:
        Path(copy).unlink(missing_ok=True)
    source.unlink()
    return target


def _claim(source: Path, folder: Path, name: str) -> Path:
    """Gives `source` the first free name. A hard link never replaces a file; some file systems have none."""
    for target in (folder / candidate for candidate in _names(name)):
        try:
            os.link(source, target)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if target.exists():
                continue
            os.rename(source, target)
            return target
        source.unlink()
        return target
    raise AssertionError("there is always another name")


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
