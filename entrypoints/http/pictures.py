"""Pictures that HTTP requests bring: files of forms, data: URLs, addresses. From there on they are as all others."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from safelight.entrypoints.http.addresses import UrlPolicy
from safelight.entrypoints.http.fetch import fetch
from safelight.runtime.errors import InvalidRequest, Overloaded
from safelight.runtime.inputs import MAX_BYTES, MAX_PIXELS, InputStore, Picture, check_picture
from safelight.runtime.messages import InputImage

AT_ONCE = 4  # requests whose pictures are decoded
FETCHES = 8  # at once
MAX_WAITING = 64  # requests
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Brought:
    """The pictures of one request, not looked at yet; `param` is what the client calls them."""

    param: str
    files: tuple[bytes, ...] = ()
    urls: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.files) + len(self.urls)

    def digest(self) -> bytes:
        """The same for the same pictures: a client that tries again."""
        found = hashlib.sha256()
        for part in (*self.files, *(url.encode("utf-8", "surrogatepass") for url in self.urls)):
            found.update(hashlib.sha256(part).digest())
        return found.digest()


class Intake:
    """Belongs to one event loop. What is in memory at a time is bounded: requests, their bytes and their pixels."""

    def __init__(self, store: InputStore, policy: UrlPolicy) -> None:
        self._store, self._policy = store, policy
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="pictures")
        self._fetching, self._decoding = asyncio.Semaphore(FETCHES), asyncio.Semaphore(AT_ONCE)
        self._waiting = 0

    async def take(
        self, brought: Brought, check: Callable[[tuple[Picture, ...]], object] = lambda pictures: None
    ) -> tuple[InputImage, ...]:
        """Decodes the pictures, has their sizes checked, and stores them where the workers find them.

        Raises InvalidRequest under the client's name of them, what `check` raises, and Overloaded.
        """
        if self._waiting >= MAX_WAITING:
            raise Overloaded("the pictures of many requests wait to be decoded; try again later", retry_after_s=5)
        self._waiting += 1
        try:
            contents = [*brought.files]
            for url in brought.urls:
                contents.append(await self._content(url, brought.param))
            async with self._decoding:
                pictures = await self._pictures(contents, brought.param)
                check(pictures)
                return tuple([await self._run(self._store.add, picture) for picture in pictures])
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _pictures(self, contents: Sequence[bytes], param: str) -> tuple[Picture, ...]:
        found, left = [], MAX_PIXELS
        for data in contents:
            picture = await self._run(check_picture, data, param, left)
            left -= picture.ref.width * picture.ref.height
            found.append(picture)
        return tuple(found)

    async def _content(self, url: str, param: str) -> bytes:
        if url[:5].lower() == "data:":
            return await self._run(of_data_url, url, param)
        async with self._fetching:
            return await fetch(url, self._policy, MAX_BYTES, param)

    async def _run(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def urls_of(*fields: str | list[str] | None) -> tuple[str, ...]:
    """What several fields of a body name, in order; an empty text is none."""
    lists = [[field] if isinstance(field, str) else field or [] for field in fields]
    return tuple(url for found in lists for url in found if url)


def of_data_url(url: str, param: str) -> bytes:
    """The content of `data:image/png;base64,...`; the media type is not trusted. Raises InvalidRequest."""
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest(f"{param}: data:image/png;base64,... expected as a data: URL", param=param)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{param}: the base64 of the data: URL is not valid: {error}", param=param) from None
