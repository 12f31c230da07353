"""Every example of the service and of the Python API in docs/api.md, as a reader would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, serve

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("# The service") :]
EXAMPLES = re.findall(r"^```(bash|python)\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """The built-in model, served from an empty working directory."""
    folder = tmp_path_factory.mktemp("reader")
    with serve("--state-dir", "state", cwd=folder) as served:
        yield served, folder


def test_the_page_has_curl_sdk_and_client_examples() -> None:
    text = "".join(code for _, code in EXAMPLES)
    assert all(word in text for word in ("curl", "from openai import", "Client(", "Engine(", "AsyncClient("))


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(server: tuple[Served, Path], editor: tuple[Served, Path], number: int) -> None:
    language, code = EXAMPLES[number]
    of_editor = "30001" in code
    if code.startswith("safelight serve"):  # this is what the fixtures run
        assert ("--model-path ./sd-img2img " if of_editor else "safelight serve ") in code
        assert f"--state-dir {'edit-state' if of_editor else 'state'}\n" in code
        return
    served, folder = editor if of_editor else server
    port = served.url.rpartition(":")[2]
    assert of_editor or "30000" in code or language == "python"
    code = code.replace("localhost:30000", f"127.0.0.1:{port}").replace("localhost:30001", f"127.0.0.1:{port}")
    script = folder / f"example{number}.{'sh' if language == 'bash' else 'py'}"
    script.write_text(code)
    command = ["bash", "-euo", "pipefail", str(script)] if language == "bash" else [sys.executable, str(script)]
    environ = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    paths = [str(ROOT / "src") if path == "src" else path for path in environ["PYTHONPATH"].split(os.pathsep)]
    environ["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error":{' not in done.stdout
