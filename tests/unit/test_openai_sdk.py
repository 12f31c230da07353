"""How the OpenAI SDK behaves when the server refuses, is slow or fails: what it retries, joins and raises."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_backend import PNG, FakeBackend, http_server

from safelight.runtime import messages as m

Sdk = Callable[..., tuple[FakeBackend, openai.OpenAI]]


@pytest.fixture
def sdk(tmp_path: Path) -> Iterator[Sdk]:
    with ExitStack() as stack:

        def start(*, auto: bool = True, **options: Any) -> tuple[FakeBackend, openai.OpenAI]:
            backend = stack.enter_context(FakeBackend(tmp_path, auto=auto))
            url = stack.enter_context(http_server(backend))
            return backend, stack.enter_context(openai.OpenAI(base_url=url + "/v1", api_key="none", **options))

        yield start


def test_a_full_queue_is_tried_again_and_a_fault_is_not(sdk: Sdk) -> None:
    backend, client = sdk()
    asked: list[str] = []

    def refuse(info: m.ErrorInfo, times: int) -> Callable[[m.Submit], m.ErrorInfo | None]:
        asked.clear()

        def answer(submit: m.Submit) -> m.ErrorInfo | None:
            asked.append(submit.job)
            return info if len(asked) <= times else None

        return answer

    backend.refuse = refuse(m.ErrorInfo("overloaded", "full", retry_after_s=1.0), 1)
    assert client.images.generate(prompt="a").data
    assert len(asked) == 2
    backend.refuse = refuse(m.ErrorInfo("internal", "a fault"), 9)
    with pytest.raises(openai.InternalServerError):
        client.images.generate(prompt="a")
    assert len(asked) == 1


def test_a_timeout_of_the_sdk_joins_the_running_job(sdk: Sdk) -> None:
    backend, client = sdk(auto=False, timeout=2.0, max_retries=2)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.images.generate, prompt="a")
        backend.until(lambda: len(backend.executions) == 1)
        job = backend.executions[0]
        backend.until(lambda: len(backend.jobs[job].subscribers) == 1)
        backend.until(lambda: not backend.jobs[job].subscribers)  # timed out
        backend.until(lambda: len(backend.jobs[job].subscribers) == 1)  # and came back
        backend.complete(job)
        assert reply.result().data
    assert (len(backend.executions), backend.cancelled) == (1, [])


def test_a_stream_is_its_previews_in_order_and_then_the_picture(sdk: Sdk) -> None:
    backend, client = sdk(auto=False)
    with client.images.generate(prompt="a", stream=True, partial_images=2) as stream:
        backend.until(lambda: len(backend.executions) == 1)
        job = backend.executions[0]
        for number in range(2):
            backend.preview(job, number)
        backend.complete(job)
        events = list(stream)
    assert [type(event).__name__ for event in events] == ["ImageGenPartialImageEvent"] * 2 + ["ImageGenCompletedEvent"]
    assert [event.partial_image_index for event in events if event.type == "image_generation.partial_image"] == [0, 1]
    for event in events:
        assert base64.b64decode(event.b64_json) == PNG
        type(event).model_validate(event.to_dict(), strict=True)  # every field that the SDK types


def test_a_failure_in_a_stream_raises(sdk: Sdk) -> None:
    backend, client = sdk(auto=False)
    stream = client.images.generate(prompt="a", stream=True)
    backend.until(lambda: len(backend.executions) == 1)
    backend.fail(backend.executions[0], message="it broke")
    with pytest.raises(openai.APIError, match="it broke"):
        list(stream)
    stream.close()


def test_a_wrong_or_missing_key_is_an_authentication_error(tmp_path: Path) -> None:
    with FakeBackend(tmp_path) as backend, http_server(backend, api_keys=(("local", "right"),)) as url:
        with openai.OpenAI(base_url=url + "/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=url + "/v1", api_key="right") as client:
            assert client.models.list().data
