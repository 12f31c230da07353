"""The files of one take: the output itself and, when asked for, its raw frames."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from safelight.runtime.messages import Artifact, MediaFormat, OpenJob, OpenTake
from safelight.runtime.output.artifacts import ArtifactStore, Partial, Seal
from safelight.runtime.output.media import MEDIA_TYPES, Encoder, Frames, extension, open_encoder


@dataclass(slots=True)
class _File:
    partial: Partial
    encoder: Encoder
    seal: Seal | None = None


class TakeWriter:
    """`add` all frames, then `seal`, then `publish`; or `discard` at any point. One thread at a time.

    All but `publish` (two renames) may take long. Raises what files and encoders raise.
    """

    def __init__(self, store: ArtifactStore, job: OpenJob, take: OpenTake) -> None:
        self._store = store
        self._job = job
        self._take = take
        self._files: dict[MediaFormat, _File] = {}

    @property
    def unfinished(self) -> bool:
        """Whether there are files to publish or discard."""
        return bool(self._files)

    def add(self, frames: Frames) -> None:
        """The next frames (F, H, W, 3); the first ones open the files."""
        media = self._job.media
        for format in (MediaFormat.NPY, media.format) if media.with_frames else (media.format,):
            if format not in self._files:
                self._open(format)
        for file in self._files.values():
            file.encoder.add(frames)

    def seal(self) -> None:
        """Completes and syncs the files."""
        for file in self._files.values():
            file.encoder.finish()
            file.seal = file.partial.seal()

    def publish(self) -> Artifact:
        """Gives the sealed files their names; they last once the folder is synced. An NPY output has no second file."""
        for file in self._files.values():
            self._store.publish(self._take.job, file.partial)
        files, self._files = self._files, {}
        main, frames = files.pop(self._job.media.format), files.get(MediaFormat.NPY)
        assert main.seal is not None, "sealed"
        return Artifact(
            index=self._take.index,
            path=str(main.partial.final),
            media_type=MEDIA_TYPES[self._job.media.format],
            nbytes=main.seal.nbytes,
            sha256=main.seal.sha256,
            frames_path=str(frames.partial.final) if frames else None,
        )

    def discard(self) -> None:
        """Deletes what is not published."""
        while self._files:
            _, file = self._files.popitem()
            file.encoder.abort()
            file.partial.discard()

    def _open(self, format: MediaFormat) -> None:
        take = self._take
        final = self._store.path_of(take.job, take.attempt, take.index, extension(format))
        with contextlib.ExitStack() as undo:
            partial = Partial(final, take.take)
            undo.callback(partial.discard)
            self._files[format] = _File(partial, open_encoder(partial.path, format, self._job))
            undo.pop_all()
