"""What `import safelight` offers: changing it breaks users."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import safelight
from safelight.entrypoints import address_card
from safelight.runtime.errors import ConfigError

JOB = {"id", "progress", "result", "cancel"}
SESSION = {"submit", "generate", "attach"}


def public(kind: Any) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind) if not name.startswith("_")}


def test_the_package_offers_these_names() -> None:
    assert set(safelight.__all__) == {"AsyncClient", "Client", "Engine", "Preview", "__version__"}
    assert public(safelight.Client) == public(safelight.Engine) == SESSION | {"close"}
    assert public(safelight.AsyncClient) == SESSION
    with pytest.raises(AttributeError, match="Clinet"):
        safelight.Clinet  # noqa: B018


def test_sync_and_async_take_the_same_parameters() -> None:
    ours, theirs = (inspect.signature(kind.submit).parameters for kind in (safelight.Client, safelight.AsyncClient))
    assert list(ours) == list(theirs)
    assert {name for name in ours if name not in ("self", "params")} == {
        "prompt", "detach", "priority", "deadline_s", "output_format", "output_quality", "images",
    }  # fmt: skip
    for module, kind in (("sessions", "Job"), ("async_sessions", "AsyncJob")):
        found = getattr(__import__(f"safelight.entrypoints.{module}", fromlist=[kind]), kind)
        assert public(found) | {"id"} == JOB


def test_a_wrong_endpoint_says_what_is_expected(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="state folder of a running"):
        safelight.Client(tmp_path)
    (tmp_path / address_card.NAME).write_text("{}")
    with pytest.raises(ConfigError, match="state folder of a running"):
        safelight.AsyncClient(tmp_path)
