"""Keys in files, and tcp endpoints that admit known keys only."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq

from safelight.runtime import curve, transport
from safelight.runtime.curve import CurveKeys, Gatekeeper, client_keys, make_keys, server_keys
from safelight.runtime.errors import ConfigError, StartupError
from safelight.runtime.messages import Cancel, CancelAccepted, FromScheduler, ToScheduler


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    make_keys(folder)
    return folder


class Host:
    """A server on a free tcp port, and clients of it, each with a context of its own as in other processes."""

    def __init__(self, keys: CurveKeys, stack: ExitStack) -> None:
        self.stack = stack
        context = self.context()
        stack.enter_context(Gatekeeper(context, keys.allowed))
        self.router = stack.enter_context(transport.bind_router(context, "tcp://127.0.0.1:*", ToScheduler, keys))
        self.endpoint = self.router.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def context(self) -> zmq.Context[Any]:
        context: zmq.Context[Any] = zmq.Context()
        self.stack.callback(context.destroy, 0)
        return context

    def dealer(self, keys: CurveKeys) -> transport.Channel[Any]:
        channel = transport.connect_dealer(self.context(), self.endpoint, FromScheduler, b"me", keys)
        return self.stack.enter_context(channel)

    def receive(self) -> list[transport.Received[Any]]:
        return list(self.router.receive_all())


@pytest.fixture
def host(keys: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(server_keys(keys), stack)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_secrets_are_readable_by_their_owner_only_and_nothing_is_overwritten(keys: Path) -> None:
    assert {path.name for path in keys.glob("*.key*")} == {
        "server.key", "server.key_secret", "client.key", "client.key_secret"
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o077 == 0 for path in (keys, *keys.rglob("*")))
    before = (keys / "server.key_secret").read_bytes()
    with pytest.raises(ConfigError, match="already"):
        make_keys(keys)
    assert (keys / "server.key_secret").read_bytes() == before


def test_secrets_that_others_may_read_are_refused(keys: Path) -> None:
    (keys / "server.key_secret").chmod(0o640)
    with pytest.raises(ConfigError, match="0640"):
        server_keys(keys)
    client_keys(keys)
    (keys / "client.key_secret").chmod(0o604)
    with pytest.raises(ConfigError, match="chmod 600"):
        client_keys(keys)


@pytest.mark.parametrize("damage", ["missing", "empty", "no secret", "short"])
def test_unusable_key_files_are_named(keys: Path, damage: str) -> None:
    path = keys / "client.key_secret"
    text = path.read_text()
    path.unlink()
    if damage != "missing":
        short = text.replace(text.split('"')[1], "abcde")
        path.write_text({"empty": "", "no secret": (keys / "client.key").read_text(), "short": short}[damage])
        path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"client\.key_secret"):
        client_keys(keys)


def test_a_server_needs_an_allow_list(keys: Path) -> None:
    shutil.rmtree(keys / curve.ALLOWED)
    with pytest.raises(ConfigError, match="allowed"):
        server_keys(keys)


def test_messages_and_frames_travel_over_tcp(host: Host, keys: Path) -> None:
    dealer = host.dealer(client_keys(keys))
    dealer.send(Cancel("job", "owner"), frames=[b"media" * 1000])
    assert host.router.socket.poll(10_000)
    [received] = host.receive()
    assert bytes(received.frames[0]) == b"media" * 1000
    host.router.send(CancelAccepted("job"), received.identity)
    assert dealer.socket.poll(10_000)
    assert [answer.message for answer in dealer.receive_all()] == [CancelAccepted("job")]


def test_an_unknown_client_is_refused_and_logged(
    host: Host, keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_keys(tmp_path / "other")
    stranger = client_keys(tmp_path / "other")
    known = client_keys(keys)
    dealer = host.dealer(CurveKeys(stranger.public, stranger.secret, server=known.server))
    with caplog.at_level(logging.ERROR):
        with suppress(transport.PeerBusy):  # refused before this
            dealer.send(Cancel("job", "stranger"))
        until(lambda: list(dealer.receive_all()) or dealer.handshakes_failed)
    assert f"its key {stranger.public.decode()} is not on the allow list" in caplog.text
    assert host.receive() == []
    host.dealer(known).send(Cancel("job", "owner"))
    assert host.router.socket.poll(10_000)
    assert [r.message for r in host.receive()] == [Cancel("job", "owner")]


def test_a_client_with_a_wrong_server_key_is_refused_and_logged(
    host: Host, keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_keys(tmp_path / "other")
    known = client_keys(keys)
    wrong = CurveKeys(known.public, known.secret, server=client_keys(tmp_path / "other").server)
    with caplog.at_level(logging.ERROR):
        host.dealer(wrong).send(Cancel("job", "owner"))
        until(lambda: host.receive() or host.router.handshakes_failed)
    assert host.receive() == []
    assert "the keys do not match" in caplog.text


def test_a_peer_without_curve_gets_nothing(host: Host) -> None:
    with host.context().socket(zmq.DEALER) as plain:
        plain.setsockopt(zmq.LINGER, 0)
        plain.connect(host.endpoint)
        with suppress(zmq.Again):  # refused before this: libzmq has given the connection up, queue and all
            plain.send(transport.encode(Cancel("job", "owner")), zmq.NOBLOCK)
        until(lambda: host.receive() or host.router.handshakes_failed)
    assert host.receive() == []


def test_without_a_gatekeeper_nobody_gets_in(keys: Path) -> None:
    with ExitStack() as stack:
        context: zmq.Context[Any] = zmq.Context()
        stack.callback(context.destroy, 0)
        router = stack.enter_context(
            transport.bind_router(context, "tcp://127.0.0.1:*", ToScheduler, server_keys(keys))
        )
        endpoint = router.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        dealer = transport.connect_dealer(context, endpoint, FromScheduler, b"me", client_keys(keys))
        with dealer:
            dealer.send(Cancel("job", "owner"))
            until(lambda: list(router.receive_all()) or router.handshakes_failed)
        assert list(router.receive_all()) == []


def test_tcp_without_keys_is_an_error(keys: Path) -> None:
    with zmq.Context() as context:
        with pytest.raises(ConfigError, match="safelight keys"):
            transport.bind_router(context, "tcp://127.0.0.1:*", ToScheduler)
        with pytest.raises(ConfigError, match="--keys"):
            transport.connect_dealer(context, "tcp://127.0.0.1:9", FromScheduler)


def test_a_taken_port_is_a_clear_error(host: Host, keys: Path) -> None:
    with pytest.raises(StartupError, match="port taken"):
        transport.bind_router(host.context(), host.endpoint, ToScheduler, server_keys(keys))
