"""`safelight.AsyncClient`: as `safelight.Client`, on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safelight.entrypoints import address_card, async_client
from safelight.entrypoints.client import error_of_end
from safelight.entrypoints.previews import Preview
from safelight.entrypoints.results import RequestMaker, Result
from safelight.runtime.messages import Event, Priority, Progress, Status, Submit
from safelight.runtime.ulid import new_ulid

if TYPE_CHECKING:
    from safelight.entrypoints.pictures import PictureLike


class AsyncJob:
    """One submitted or attached job."""

    def __init__(self, wire: async_client.AsyncClient, job: str, owner: str, *, held: bool) -> None:
        self._wire, self.id, self._owner, self._held = wire, job, owner, held
        self._end: Event | None = None

    async def progress(self) -> AsyncIterator[Progress | Preview]:
        """What happens, up to the end; steps may be left out. Previews come if the job was submitted with `previews`:
        so many of each output, as `preview.image`, fewer when one is lost."""
        if self._end is None:
            async for event in self._wire.events(self.id, self._owner):
                if isinstance(event, Preview):
                    yield event
                    continue
                if event.progress is not None:
                    yield event.progress
                if event.status is not None:
                    self._end = event
        if self._held:
            self._held = False
            self._wire.release(self.id, self._owner)

    async def result(self) -> Result:
        """Waits for the end. Raises JobFailed, Poisoned, Cancelled, ..."""
        async for _ in self.progress():
            pass
        assert self._end is not None, "progress ends with the job"
        if self._end.status is not Status.COMPLETED:
            raise error_of_end(self._end)
        return Result(self.id, self._end.artifacts)

    async def cancel(self) -> None:
        """Raises NotFound, or WorkerLost."""
        await self._wire.cancel(self.id, self._owner)


class AsyncClient:
    """Of a running `safelight serve` on this host; `endpoint` is its state folder. Use it with `async with`."""

    def __init__(self, endpoint: str | Path, owner: str = "local") -> None:
        card, inputs = address_card.read(endpoint)
        self._maker, self._owner = RequestMaker(card.spec, inputs, card.vae_path), owner
        self._wire = async_client.AsyncClient(card.endpoints)

    async def submit(
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
    ) -> AsyncJob:
        """As Client.submit."""
        request = await asyncio.to_thread(self._maker.make, prompt, output_format, output_quality, images, **params)
        job = new_ulid()
        await self._wire.submit(Submit(job, self._owner, request, not detach, Priority(priority), deadline_s))
        if not detach:
            self._wire.hold(job, self._owner)
        return AsyncJob(self._wire, job, self._owner, held=not detach)

    async def generate(self, prompt: str, **options: Any) -> Result:
        """Submits and waits."""
        return await (await self.submit(prompt, **options)).result()

    async def attach(self, job: str) -> AsyncJob:
        """A job that exists, by its id. Raises NotFound."""
        await self._wire.job(job, self._owner)
        return AsyncJob(self._wire, job, self._owner, held=False)

    async def __aenter__(self) -> AsyncClient:
        await self._wire.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._wire.__aexit__(kind, error, trace)
