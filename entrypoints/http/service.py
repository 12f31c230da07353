"""What the routes share: submitting, joining a retry, holding attached jobs while somebody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request

from safelight.entrypoints.async_client import AsyncClient
from safelight.entrypoints.client import error_of
from safelight.entrypoints.http.metrics import Metrics
from safelight.entrypoints.http.monitor import Monitor
from safelight.entrypoints.http.pictures import Brought, Intake
from safelight.entrypoints.http.schemas import MAX_SEED, ImageRequest, VideoRequest
from safelight.entrypoints.http.translate import Translator
from safelight.runtime.errors import InvalidRequest, JobFailed, SafelightError
from safelight.runtime.messages import Event, GenerationRequest, Status, Submit
from safelight.runtime.ulid import from_bits, new_ulid

RETRY_WINDOW_S = 150.0  # the OpenAI SDK waits up to 120 s before it tries again
MAX_RETRIES_KNOWN = 10_000
SETTLE_S = 2.0
LINGER_S = 10.0  # an SDK that timed out comes back within this
MAX_KEY_LENGTH = 255


class ClientGone(Exception):
    """Nobody waits for the reply any more."""


@dataclass(slots=True)
class _Attempt:
    submit: Submit
    seen: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """One client that waits for a job."""

    job: str
    owner: str
    request: GenerationRequest
    existing: bool
    keyed: bool
    timeout_s: float | None  # after which the client gives up and tries again, if it says so
    since: float


class Service:
    """One server's connection to the scheduler and output, and what it knows of its clients."""

    def __init__(
        self, client: AsyncClient, translator: Translator, monitor: Monitor, metrics: Metrics, intake: Intake
    ) -> None:
        self.client, self.translator, self.monitor, self.metrics = client, translator, monitor, metrics
        self._intake = intake
        self._attempts: dict[tuple[str, str, bytes], _Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    # ---- submitting

    async def submit(self, request: Request, body: ImageRequest | VideoRequest, brought: Brought) -> Waiting:
        """Submits a job, or joins the one of an earlier try. Raises what it is refused with."""
        owner: str = request.state.owner
        origin = "images" if isinstance(body, ImageRequest) else "videos"
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
            raise InvalidRequest(f"Idempotency-Key: 1 to {MAX_KEY_LENGTH} characters expected", param="Idempotency-Key")
        content = type(body).__name__.encode() + msgspec.msgpack.encode(body) + brought.digest()
        digest = (owner, origin, hashlib.sha256(content).digest())
        earlier = self._attempts.get(digest)
        if key is None and earlier is not None and _is_retry(request) and _fresh(earlier):
            submit = earlier.submit
        else:
            submit = await self._new(body, brought, owner, origin, key)
        self._remember(digest, submit)
        try:
            accepted = await self.client.submit(submit)
        except SafelightError:
            self._disown(submit.job)
            raise
        if accepted.existing and key is not None:
            accepted = await self._again_if_cancelled(submit, accepted.existing)
        self.metrics.submitted(origin, accepted.existing)
        timeout = _number(request.headers.get("x-stainless-read-timeout"))
        keyed = key is not None
        return Waiting(submit.job, owner, submit.request, accepted.existing, keyed, timeout, time.monotonic())

    async def _new(
        self, body: ImageRequest | VideoRequest, brought: Brought, owner: str, origin: str, key: str | None
    ) -> Submit:
        job, seed = new_ulid(), None
        if key is not None:  # the same key is the same job, also after a restart: id and seed follow from it
            bits = hashlib.sha256("\0".join((owner, origin, key)).encode("utf-8", "surrogateescape")).digest()
            job, seed = from_bits(int.from_bytes(bits[:16])), int.from_bytes(bits[16:24]) % 2**31 % MAX_SEED
        if isinstance(body, ImageRequest):
            made = await self.translator.image(body, seed, brought, self._intake)
        else:
            made = await self.translator.video(body, seed, brought, self._intake)
        return Submit(job, owner, made, attached=origin == "images", origin=origin)

    async def _again_if_cancelled(self, submit: Submit, existing: bool) -> Any:
        """A key whose job was cancelled when its client went away is free again."""
        state = await self.client.job(submit.job, submit.owner)
        if submit.attached and state.status is Status.CANCELLED:
            await self.client.forget(submit.job, submit.owner)
        return await self.client.submit(submit)

    def _remember(self, digest: tuple[str, str, bytes], submit: Submit) -> None:
        self._attempts.pop(digest, None)
        self._attempts[digest] = _Attempt(submit, time.monotonic())
        while self._attempts:
            oldest = next(iter(self._attempts))
            if _fresh(self._attempts[oldest]) and len(self._attempts) <= MAX_RETRIES_KNOWN:
                return
            del self._attempts[oldest]

    def _disown(self, job: str) -> None:
        for digest in [d for d, attempt in self._attempts.items() if attempt.submit.job == job]:
            del self._attempts[digest]

    # ---- waiting

    @contextlib.asynccontextmanager
    async def attached(self, waiting: Waiting) -> AsyncIterator[None]:
        """Holds the job's lease; the last one who leaves before its end cancels it."""
        self.client.hold(waiting.job, waiting.owner)
        ended = False
        try:
            yield
            ended = True
        finally:
            waited = time.monotonic() - waiting.since
            timed_out = waiting.timeout_s is not None and waited >= waiting.timeout_s - 1.0
            if ended:
                self.client.release(waiting.job, waiting.owner)
            else:
                self.spawn(self._leave(waiting, LINGER_S if timed_out else 0.0))

    async def _leave(self, waiting: Waiting, after_s: float) -> None:
        if after_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), after_s)
        if not self.client.release(waiting.job, waiting.owner):
            return
        self._disown(waiting.job)
        with contextlib.suppress(SafelightError):
            if waiting.keyed:  # the key is free again
                await self.client.forget(waiting.job, waiting.owner)
            else:
                await self.client.cancel(waiting.job, waiting.owner)

    async def completed(self, waiting: Waiting, request: Request) -> Event:
        """The end of a completed job. Raises ClientGone, or the error of a job that did not complete."""
        end = asyncio.ensure_future(self.client.end(waiting.job, waiting.owner))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((end, gone), return_when=asyncio.FIRST_COMPLETED)
            if not end.done():
                raise ClientGone
            return checked(end.result())
        finally:
            end.cancel()
            gone.cancel()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs something that must not end with the request."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Ends what `spawn` began."""
        self._closing.set()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=SETTLE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


def checked(event: Event) -> Event:
    """A terminal event, if it is a completed one. Raises the error of another."""
    if event.status is not Status.COMPLETED:
        raise error_of(event.error) if event.error else JobFailed(f"the job ended as {event.status}")
    return event


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _is_retry(request: Request) -> bool:
    return (_number(request.headers.get("x-stainless-retry-count")) or 0) >= 1


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _fresh(attempt: _Attempt) -> bool:
    return time.monotonic() - attempt.seen < RETRY_WINDOW_S
