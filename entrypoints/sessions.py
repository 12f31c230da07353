"""The synchronous Python API: `safelight.Client` of a running server, `safelight.Engine` with processes of its own.

Both belong to one thread. Errors are the classes of `safelight.runtime.errors`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from safelight.configs.families import ModelSpec, identify
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints import address_card, client
from safelight.entrypoints.model_path import find_root, with_local_vae
from safelight.entrypoints.previews import Preview
from safelight.entrypoints.results import RequestMaker, Result
from safelight.entrypoints.serve import frame_bytes, most_pixels
from safelight.runtime.inputs import InputStore
from safelight.runtime.launch.supervisor import Supervisor
from safelight.runtime.messages import Endpoints, Event, Priority, Progress, Status

if TYPE_CHECKING:
    from safelight.entrypoints.pictures import PictureLike


class Job:
    """One submitted or attached job."""

    def __init__(self, wire: client.Client, job: str) -> None:
        self._wire, self.id = wire, job
        self._end: Event | None = None

    def progress(self) -> Iterator[Progress | Preview]:
        """What happens, up to the end; steps may be left out. Previews come if the job was submitted with `previews`:
        so many of each output, as `preview.image`, fewer when one is lost."""
        if self._end is None:
            for event in self._wire.events(self.id):
                if isinstance(event, Preview):
                    yield event
                    continue
                if event.progress is not None:
                    yield event.progress
                if event.status is not None:
                    self._end = event

    def result(self) -> Result:
        """Waits for the end. Raises JobFailed, Poisoned, Cancelled, ..."""
        for _ in self.progress():
            pass
        assert self._end is not None, "progress ends with the job"
        if self._end.status is not Status.COMPLETED:
            raise client.error_of_end(self._end)
        return Result(self.id, self._end.artifacts)

    def cancel(self) -> None:
        """Raises NotFound, or WorkerLost."""
        self._wire.cancel(self.id)


class Session:
    """What Client and Engine share."""

    def __init__(
        self, endpoints: Endpoints, spec: ModelSpec, inputs: InputStore, owner: str, vae_path: str | None = None
    ) -> None:
        self._maker = RequestMaker(spec, inputs, vae_path)
        self._wire = client.Client(endpoints, owner)

    def submit(
        self,
        prompt: str,
        *,
        detach: bool = False,
        priority: str = "normal",
        deadline_s: float | None = None,
        output_format: str | None = None,
        output_quality: int | None = None,
        images: Sequence[PictureLike] = (),
        **params: Any,
    ) -> Job:
        """Returns once the job is journalled. `params` are the sampling parameters of `safelight generate`; `images`
        are the pictures to start from: paths, bytes of files, or pictures of PIL.

        A detached job outlives this client, another ends soon after it. Raises InvalidRequest, Overloaded, ...
        """
        request = self._maker.make(prompt, output_format, output_quality, images, **params)
        name = self._wire.submit(request, attached=not detach, priority=Priority(priority), deadline_s=deadline_s)
        return Job(self._wire, name)

    def generate(self, prompt: str, **options: Any) -> Result:
        """Submits and waits."""
        return self.submit(prompt, **options).result()

    def attach(self, job: str) -> Job:
        """A job that exists, by its id. Raises NotFound."""
        self._wire.attach(job)
        return Job(self._wire, job)

    def close(self) -> None:
        """Attached jobs end soon."""
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client(Session):
    """Of a running `safelight serve` on this host; `endpoint` is its state folder."""

    def __init__(self, endpoint: str | Path, owner: str = "local") -> None:
        card, inputs = address_card.read(endpoint)
        super().__init__(card.endpoints, card.spec, inputs, owner, card.vae_path)


class Engine(Session):
    """Starts the processes and ends them with `close`: `with Engine(model_path=...) as engine: ...`.

    The arguments are the flags of `safelight serve` that concern model and processes, with underscores.
    """

    def __init__(self, model_path: str | None = None, *, max_pixels: int | None = None, **args: Any) -> None:
        settings = with_local_vae(ServerArgs(model_path=model_path, **args))
        root = find_root(settings, logging.getLogger(__name__).info)
        spec = identify(root, settings.backend, settings.trust_remote_code)
        self._server = Supervisor(settings, root, frame_bytes(spec, max_pixels or most_pixels(spec))).start()
        try:
            self._server.wait_ready(settings.startup_timeout_s)
            super().__init__(self._server.endpoints, spec, self._server.inputs, "local", settings.vae_path)
        except BaseException:
            self._server.stop()
            raise

    def close(self) -> None:
        super().close()
        self._server.stop()
