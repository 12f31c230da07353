"""CURVE for tcp endpoints: the key files of `safelight keys`, and the gatekeeper that admits known clients only.

A keys folder (0700) holds zmq.auth certificates, one a file: `server.key` and `client.key` are public,
`server.key_secret` and `client.key_secret` are secret (0600). `allowed/*.key` is the server's allow list. Keys never
travel on a command line, in a specification or over a store: processes are told the folder.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq
import zmq.auth
from zmq.utils import z85

from safelight.runtime.errors import ConfigError

ALLOWED = "allowed"
_ZAP = "inproc://zeromq.zap.01"
_GROUP_AND_OTHERS = 0o077
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """This side's key pair; a client has `server` (the peer's public key), a server has `allowed` (its clients')."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes = b""
    allowed: frozenset[bytes] = frozenset()


def make_keys(folder: Path) -> list[Path]:
    """Makes a server's and a client's keys and the allow list; overwrites nothing. Raises ConfigError."""
    if not zmq.has("curve"):
        raise ConfigError("this libzmq was built without CURVE; install pyzmq's own wheel")
    names = [f"{role}.key{kind}" for role in ("server", "client") for kind in ("", "_secret")]
    if there := [name for name in (*names, ALLOWED) if (folder / name).exists()]:
        raise ConfigError(f"{folder} has {', '.join(there)} already; name a new folder, or delete them first")
    before = os.umask(_GROUP_AND_OTHERS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ALLOWED).mkdir()
        for role in ("server", "client"):
            zmq.auth.create_certificates(folder, role)
        public = (folder / "client.key").read_bytes()
        (folder / ALLOWED / "client.key").write_bytes(public)
    except OSError as error:
        raise ConfigError(f"cannot write keys to {folder}: {error}") from error
    finally:
        os.umask(before)
    return [folder / name for name in names] + [folder / ALLOWED / "client.key"]


def server_keys(folder: Path) -> CurveKeys:
    """A server's pair and allow list. Raises ConfigError: missing, malformed, or readable by others."""
    public, secret = _pair(folder, "server")
    allowed = frozenset(_load(path)[0] for path in sorted((folder / ALLOWED).glob("*.key")))
    if not allowed:
        raise ConfigError(f"{folder / ALLOWED} expected to hold the *.key files of clients, holds none", param="keys")
    return CurveKeys(public, secret, allowed=allowed)


def client_keys(folder: Path) -> CurveKeys:
    """A client's pair and the server's public key. Raises ConfigError: missing, malformed, or readable by others."""
    public, secret = _pair(folder, "client")
    return CurveKeys(public, secret, server=_load(folder / "server.key")[0])


def _pair(folder: Path, role: str) -> tuple[bytes, bytes]:
    path = folder / f"{role}.key_secret"
    public, secret = _load(path)
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read: {error}", param="keys") from error
    if mode & _GROUP_AND_OTHERS:
        raise ConfigError(
            f"key file {path} has mode {mode:04o}: others may read it; make new keys, or `chmod 600` it if nobody did",
            param="keys",
        )
    if secret is None:
        raise ConfigError(f"key file {path} has no secret key; make new ones with `safelight keys`", param="keys")
    return public, secret


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
        for key in (public, secret):
            if key is not None and len(z85.decode(key)) != 32:
                raise ValueError("a key has 32 bytes in Z85")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"key file {path} cannot be used: {error}; `safelight keys {path.parent}` makes the files", param="keys"
        ) from error
    return public, secret


class Gatekeeper:
    """Answers libzmq's questions (ZAP, RFC 27) for the tcp sockets of one context, on a thread of its own.

    Make it before the first tcp socket is bound, close it before the context ends. Who is not on the list is refused
    and logged.
    """

    def __init__(self, context: zmq.Context[Any], allowed: frozenset[bytes]) -> None:
        self._allowed = allowed
        self._socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="gatekeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        with self._socket:
            while self._wake not in (ready := dict(poller.poll())):
                if self._socket in ready:
                    self._socket.send_multipart(self._answer(self._socket.recv_multipart()))

    def _answer(self, request: list[bytes]) -> list[bytes]:
        version, sequence, _domain, address, _identity, mechanism, *credentials = request
        key = z85.encode(credentials[0]) if credentials and mechanism == b"CURVE" else b""
        if key in self._allowed:
            return [version, sequence, b"200", b"OK", b"", b""]
        log.error("refused a connection from %s: its key %s is not on the allow list", address.decode(), key.decode())
        return [version, sequence, b"400", b"unknown key", b"", b""]

    def __enter__(self) -> Gatekeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
