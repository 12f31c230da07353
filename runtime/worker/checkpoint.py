"""Latent checkpoints: written by a thread of their own, temp + fsync + rename, named by what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from safelight.runtime.errors import JobFailed
from safelight.runtime.messages import CheckpointRef, ErrorInfo


@dataclass(frozen=True, slots=True)
class SaveTask:
    """`tensors` is called on the writer's thread after `after` (a CUDA event) has passed; it returns CPU tensors."""

    name: str
    step: int
    tensors: Callable[[], dict[str, torch.Tensor]]
    after: torch.cuda.Event | None
    report: Callable[[CheckpointRef | ErrorInfo], None]


class CheckpointWriter:
    """Writes checkpoints in order on one thread; `report` gets the reference or the reason of a failure."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tasks: queue.SimpleQueue[SaveTask | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def submit(self, task: SaveTask) -> None:
        self._tasks.put(task)

    def close(self, timeout_s: float = 5.0) -> None:
        """Finishes what is queued."""
        self._tasks.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task.report(self._write(task))
            except (OSError, RuntimeError) as error:
                task.report(ErrorInfo(JobFailed.code, f"checkpoint {task.name} was not written: {error}"))

    def _write(self, task: SaveTask) -> CheckpointRef:
        if task.after is None:
            tensors = task.tensors()
        else:
            task.after.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                tensors = task.tensors()
        data = safetensors.torch.save(tensors)
        path = self._folder / f"{task.name}.safetensors"
        write_durably(path, data)
        return CheckpointRef(str(path), task.step, hashlib.sha256(data).hexdigest())


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file that is whole after a crash or not there: temp name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_checkpoint(ref: CheckpointRef) -> dict[str, torch.Tensor]:
    """The tensors of a journalled checkpoint. Raises JobFailed when the file is missing or not the one journalled."""
    try:
        data = Path(ref.path).read_bytes()
    except OSError as error:
        raise JobFailed(f"checkpoint {ref.path} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise JobFailed(f"checkpoint {ref.path} is not the file that was journalled: its sha256 differs")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise JobFailed(f"checkpoint {ref.path} is not a safetensors file: {error}") from error
