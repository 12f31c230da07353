"""The service obeys its own /openapi.json: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from fake_backend import FakeBackend, http_server

CASES_OF_AN_OPERATION = 150


def test_every_operation_and_reply_is_described(tmp_path: Path) -> None:
    with FakeBackend(tmp_path) as backend, http_server(backend) as url:
        document = httpx2.get(url + "/openapi.json").json()
    assert {(method, path) for path, found in document["paths"].items() for method in found} == {
        ("post", "/v1/images/generations"),
        ("post", "/v1/images/edits"),
        ("get", "/v1/images/{id}/content"),
        ("post", "/v1/videos"),
        ("get", "/v1/videos"),
        ("get", "/v1/videos/{id}"),
        ("delete", "/v1/videos/{id}"),
        ("get", "/v1/videos/{id}/content"),
        ("get", "/v1/videos/{id}/events"),
        ("get", "/v1/models"),
        ("get", "/v1/models/{model}"),
        ("get", "/models"),
        ("get", "/health"),
        ("get", "/ready"),
        ("get", "/metrics"),
    }
    schemas = document["components"]["schemas"]
    assert set(schemas["Video"]["required"]) <= set(schemas["Video"]["properties"])
    assert schemas["ImageRequest"]["required"] == ["prompt"]
    content = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/ImageEditRequest"}
    form = content["multipart/form-data"]["schema"]["properties"]
    assert form["image[]"]["anyOf"][1]["items"] == {"type": "string", "format": "binary"}
    assert set(form) == set(schemas["ImageEditRequest"]["properties"])
    assert {"type": "null"} in schemas["ImageRequest"]["properties"]["n"]["anyOf"]


@pytest.mark.timeout(180)
def test_two_thousand_cases_meet_no_server_error_and_no_schema_violation(tmp_path: Path) -> None:
    """That a valid request may be refused is no violation: a schema cannot say that sizes are multiples of 16."""
    with FakeBackend(tmp_path) as backend, http_server(backend) as url:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color",
            "--phases", "coverage,fuzzing", "--max-examples", str(CASES_OF_AN_OPERATION), "--seed", "7",
            "--suppress-health-check", "all", "--exclude-checks", "positive_data_acceptance",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=170)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cases = re.search(r"(\d+) generated", done.stdout)
    assert cases is not None, done.stdout
    assert int(cases[1]) >= 2000
    assert backend.executions
