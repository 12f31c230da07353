"""Latent checkpoints: written by a thread of their own, temp + fsync + rename, named by what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import os
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

    name: str  # of the output; the file's name has the step as well
    step: int
    tensors: Callable[[], dict[str, torch.Tensor]]
    after: torch.cuda.Event | None
    report: Callable[[CheckpointRef | ErrorInfo], None]


class CheckpointWriter:
    """Writes checkpoints on one thread; `report` gets the reference or the reason of a failure. Without a folder every
    task fails.

    A task takes the place of one of the same name that still waits, which is never written or reported: a disk slower
    than the steps holds one state per output on the device, not one per step.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._waiting: dict[str, SaveTask] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def submit(self, task: SaveTask) -> None:
        with self._changed:
            self._waiting[task.name] = task
            self._changed.notify()

    def close(self, timeout_s: float = 5.0) -> None:
        """Finishes what is queued."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while self._write_next():
            pass  # and no task is held between two: it holds a state

    def _write_next(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return False
            task = self._waiting.pop(next(iter(self._waiting)))
        try:
            task.report(self._write(task))
        except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
            reason = f"checkpoint {task.name} of step {task.step} was not written: {error}"
            task.report(ErrorInfo(JobFailed.code, reason))
        return True

    def _write(self, task: SaveTask) -> CheckpointRef:
        if self._folder is None:
            raise OSError("not every rank sees the server's folder; let --state-dir name one on a shared file system")
        if task.after is None:
            tensors = task.tensors()
        else:
            task.after.synchronize()
            side = torch.cuda.Stream(task.after.device)  # type: ignore[no-untyped-call]  # a new thread is on device 0
            with torch.cuda.stream(side):
                tensors = task.tensors()
        data = safetensors.torch.save(tensors)
        path = self._folder / f"{task.name}-{task.step}.safetensors"
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
