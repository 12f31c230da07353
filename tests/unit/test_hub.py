"""Model directories: local, built-in, and downloaded from a stub of the hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from safelight.runtime import hub
from safelight.runtime.errors import ModelError

FILES = {
    "model_index.json": b'{"_class_name": "WanPipeline"}',
    "vae/weights.safetensors": b"weights",
    "vae/weights.bin": b"a pickle",
    "tokenizer/merges.txt": b"#version: 0.2",
    "diffusion_pytorch_model-00001-of-00002.safetensors": b"of one component",
    "tiny1-dev.safetensors": b"the same in one file",
    "run.py": b"code",
}
WANTED = {*FILES} - {"vae/weights.bin", "run.py", "tiny1-dev.safetensors"}
SHA = "a" * 40


class StubHub(BaseHTTPRequestHandler):
    """The few routes of the hub's API that a snapshot download needs."""

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/tiny/tree/"):
            entries = [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in FILES.items()]
            return self._send(json.dumps(entries).encode(), {"Content-Type": "application/json"})
        if self.path.startswith("/api/models/org/tiny"):
            info = {"id": "org/tiny", "sha": SHA, "siblings": [{"rfilename": name} for name in FILES]}
            return self._send(json.dumps(info).encode(), {"Content-Type": "application/json"})
        name = self.path.removeprefix(f"/org/tiny/resolve/{SHA}/").removeprefix("/org/tiny/resolve/main/")
        if name in FILES:
            return self._send(FILES[name], {"ETag": f'"{_oid(FILES[name])}"', "X-Repo-Commit": SHA})
        known = self.path.startswith("/org/tiny/")
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def _send(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), StubHub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_brings_weights_and_configs_but_nothing_executable(endpoint: str, tmp_path: Path) -> None:
    root = hub.download("org/tiny", quiet=True, endpoint=endpoint, cache_dir=tmp_path)
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert found == {name: FILES[name] for name in WANTED}


def test_code_is_downloaded_only_when_it_is_trusted(endpoint: str, tmp_path: Path) -> None:
    root = hub.download("org/tiny", quiet=True, code=True, endpoint=endpoint, cache_dir=tmp_path)
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found == {*WANTED, "run.py"}


def test_a_model_can_be_refused_before_its_weights_are_fetched(endpoint: str, tmp_path: Path) -> None:
    def refuse(index: Path) -> None:
        raise ModelError(f"no: {json.loads(index.read_text())['_class_name']}")

    with pytest.raises(ModelError, match="no: WanPipeline"):
        hub.download("org/tiny", quiet=True, endpoint=endpoint, cache_dir=tmp_path, inspect=refuse)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_repository_in_another_format_is_named(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FILES, "model_index.json")
    with pytest.raises(ModelError, match=r"org/tiny has no model_index\.json"):
        hub.download("org/tiny", quiet=True, endpoint=endpoint, cache_dir=tmp_path, inspect=lambda index: None)


def test_an_unknown_repository_is_a_model_error(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="check its spelling"):
        hub.download("org/typo", quiet=True, endpoint=endpoint, cache_dir=tmp_path)


def test_without_a_network_the_cached_copy_serves(endpoint: str, tmp_path: Path) -> None:
    cached = hub.download("org/tiny", quiet=True, endpoint=endpoint, cache_dir=tmp_path)
    nobody = "http://127.0.0.1:9"
    assert hub.download("org/tiny", quiet=True, endpoint=nobody, cache_dir=tmp_path) == cached
    with pytest.raises(ModelError, match="cannot be reached"):
        hub.download("org/other", quiet=True, endpoint=nobody, cache_dir=tmp_path)


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert hub.resolve(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("text", ["/no/such/place", "./here", "plain", "a/b/c"])
def test_what_is_neither_directory_nor_hub_id_names_its_flag(text: str) -> None:
    with pytest.raises(ModelError, match="--vae-path") as caught:
        hub.resolve(text, "vae_path")
    assert caught.value.param == "vae_path"
