"""safelight.Client and safelight.AsyncClient against a fake scheduler and output: previews among the progress."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_backend import PNG, FakeBackend

import safelight
from safelight.entrypoints import address_card
from safelight.runtime import hub
from safelight.runtime.errors import InvalidRequest

PARAMS: dict[str, Any] = {"num_inference_steps": 4, "seed": 1, "previews": 2}


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[FakeBackend]:
    with FakeBackend(tmp_path, auto=False) as backend:
        card = address_card.Card(backend.endpoints, str(hub.builtin_model()), "auto", False)
        address_card.write(tmp_path, card)
        (tmp_path / "inputs").mkdir()
        yield backend


def make_it(backend: FakeBackend) -> None:
    backend.until(lambda: bool(backend.executions))
    (job,) = backend.executions
    assert backend.jobs[job].submit.request.previews == 2
    for number in range(2):
        backend.progress(job, number + 1)
        backend.preview(job, number)
    backend.complete(job)


def check(found: list[object], paths: list[Path]) -> None:
    previews = [news for news in found if isinstance(news, safelight.Preview)]
    assert [(preview.index, preview.number, preview.step) for preview in previews] == [(0, 0, 1), (0, 1, 2)]
    assert [(preview.image.size, preview.image.format) for preview in previews] == [((1, 1), "PNG")] * 2
    assert [path.read_bytes() for path in paths] == [PNG]


def test_a_client_gets_pictures_while_it_waits(backend: FakeBackend, tmp_path: Path) -> None:
    with safelight.Client(tmp_path) as client:
        maker = threading.Thread(target=make_it, args=(backend,))
        maker.start()
        job = client.submit("a red apple", **PARAMS)
        check(list(job.progress()), job.result().paths)
        maker.join()
        with pytest.raises(InvalidRequest, match="at most 20"):
            client.submit("a red apple", previews=21)


def test_so_does_an_asynchronous_one(backend: FakeBackend, tmp_path: Path) -> None:
    async def run() -> None:
        async with safelight.AsyncClient(tmp_path) as client:
            job = await client.submit("a red apple", **PARAMS)
            await asyncio.to_thread(make_it, backend)
            found: list[object] = [news async for news in job.progress()]
            check(found, (await job.result()).paths)

    asyncio.run(run())
