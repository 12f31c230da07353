"""The only owner of ZMQ sockets: typed, checksummed messages over ROUTER and DEALER.

A message is one envelope frame, `SL1 | crc32 of the payload | msgpack payload`, followed by any number of raw frames
(media of a remote worker). About 6 % of bit-flipped msgpack payloads still decode, hence the checksum. Sends never
block: a peer without a route, or one whose queue is full, is a `PeerUnreachable`. Sockets belong to one thread.
Endpoints are ipc, or tcp with CURVE (`runtime/curve.py`): a tcp socket without keys is refused.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from safelight.runtime.curve import CurveKeys
from safelight.runtime.errors import ConfigError, ProtocolError, SafelightError, StartupError

MAGIC = b"SL1\x00"
MAX_MESSAGE_BYTES = 1 << 30
QUEUE_LENGTH = 10_000
_HEADER = struct.Struct(">4sI")
_FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
log = logging.getLogger(__name__)

T = TypeVar("T")


class PeerUnreachable(SafelightError):
    """No route to the peer, or its queue is full: for the sender the peer is dead."""

    code = "peer_unreachable"


class PeerBusy(PeerUnreachable):
    """The peer's queue is full, and it may take a message later; or there is none, as a handshake on tcp failed."""

    code = "peer_busy"


@dataclass(frozen=True, slots=True)
class Received(Generic[T]):
    """One message; `identity` is the sending DEALER's on a ROUTER and empty on a DEALER."""

    identity: bytes
    message: T
    frames: tuple[memoryview, ...] = ()


def encode(message: msgspec.Struct) -> bytes:
    """The envelope frame of a message."""
    payload = msgspec.msgpack.encode(message)
    return _HEADER.pack(MAGIC, zlib.crc32(payload)) + payload


def decode(decoder: msgspec.msgpack.Decoder[T], envelope: bytes | memoryview) -> T:
    """Inverse of `encode`. Raises ProtocolError for a wrong magic, checksum, tag or field."""
    view = memoryview(envelope)
    if len(view) < _HEADER.size:
        raise ProtocolError(f"an envelope has at least {_HEADER.size} bytes, got {len(view)}")
    magic, crc = _HEADER.unpack_from(view)
    payload = view[_HEADER.size :]
    if magic != MAGIC or zlib.crc32(payload) != crc:
        raise ProtocolError("envelope refused: wrong magic or checksum; do both sides run the same version?")
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"message refused: {error}") from error


class Channel(Generic[T]):
    """A ROUTER or DEALER socket that sends any message struct and receives the union `T`.

    Register `channel.socket` with a zmq.Poller; then drain it with `receive_all`.
    """

    def __init__(self, socket: zmq.Socket[bytes], receives: Any) -> None:
        self.socket = socket
        self.refused = 0  # malformed messages dropped by receive_all
        self.handshakes_failed = 0  # on tcp: connections refused for their keys, noticed by receive_all
        self._monitor: zmq.Socket[bytes] | None = None
        if socket.mechanism == zmq.CURVE:
            self._monitor = socket.get_monitor_socket(_FAILED_HANDSHAKES)
        self._router = socket.type == zmq.ROUTER
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)

    @property
    def descriptor(self) -> int:
        """For event loops. It signals an edge: after each signal and each send, `receive` until there is nothing."""
        return self.socket.getsockopt(zmq.FD)  # type: ignore[return-value]

    def send(self, message: msgspec.Struct, identity: bytes = b"", frames: Sequence[bytes | memoryview] = ()) -> None:
        """Queues a message without blocking. Raises PeerUnreachable."""
        parts = [identity] if self._router else []
        parts += [encode(message), *frames]  # type: ignore[list-item]
        try:
            self.socket.send_multipart(parts, flags=zmq.NOBLOCK, copy=True)
        except zmq.Again as error:
            raise PeerBusy(f"peer {identity!r} takes no messages: queue full, or connection refused") from error
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise PeerUnreachable(f"no route to peer {identity!r}") from error

    def receive(self) -> Received[T] | None:
        """The next message, or None when none waits. Raises ProtocolError for a malformed one (already consumed)."""
        try:
            parts = self.socket.recv_multipart(flags=zmq.NOBLOCK, copy=True)
        except zmq.Again:
            return None
        identity = parts.pop(0) if self._router and parts else b""
        if not parts:
            raise ProtocolError("a message has at least one frame, got none")
        return Received(identity, decode(self._decoder, parts[0]), tuple(memoryview(p) for p in parts[1:]))

    def receive_all(self, limit: int = 1000) -> Iterator[Received[T]]:
        """Up to `limit` waiting messages; malformed ones are counted in `refused` and dropped."""
        if self._monitor is not None:
            self._note_handshakes(self._monitor)
        for _ in range(limit):
            try:
                received = self.receive()
            except ProtocolError:
                self.refused += 1
                continue
            if received is None:
                return
            yield received

    def _note_handshakes(self, monitor: zmq.Socket[bytes]) -> None:
        while monitor.poll(0):
            event = recv_monitor_message(monitor)
            self.handshakes_failed += 1
            side = "listening on" if self._router else "connecting to"
            log.error("%s %s: a connection was refused, the keys do not match", side, event["endpoint"].decode())

    def close(self) -> None:
        if self._monitor is not None:
            self.socket.disable_monitor()
            self._monitor.close(0)
            self._monitor = None
        self.socket.close()

    def __enter__(self) -> Channel[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


def _socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str, keys: CurveKeys | None
) -> zmq.Socket[bytes]:
    if not endpoint.startswith(("ipc://", "inproc://", "tcp://")):
        raise ConfigError(f"endpoint expected to start with ipc://, inproc:// or tcp://, got {endpoint!r}")
    if is_tcp(endpoint) and keys is None:
        raise ConfigError(
            f"{endpoint}: tcp needs keys, so that only known hosts connect; make them with `safelight keys DIR` and "
            "pass --keys DIR",
            param="keys",
        )
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 500)
    socket.setsockopt(zmq.SNDHWM, QUEUE_LENGTH)
    socket.setsockopt(zmq.RCVHWM, QUEUE_LENGTH)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    if is_tcp(endpoint) and keys is not None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    return socket


def bind_router(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, receives: Any, keys: CurveKeys | None = None
) -> Channel[Any]:
    """A ROUTER that refuses unroutable sends; a peer that connects again under its identity takes it over.

    On tcp it admits the clients of `keys.allowed`: the context needs a `curve.Gatekeeper`. Raises StartupError when the
    endpoint is taken or its folder is not writable, ConfigError for tcp without a server's keys.
    """
    socket = _socket(context, zmq.ROUTER, endpoint, keys)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    if is_tcp(endpoint):
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.ZAP_DOMAIN, b"safelight")
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a gatekeeper nobody gets in
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        hint = (
            "is the port taken, and the address this host's?"
            if is_tcp(endpoint)
            else "is another server using this folder?"
        )
        raise StartupError(f"cannot listen on {endpoint}: {error}; {hint}") from error
    return Channel(socket, receives)


def connect_dealer(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    receives: Any,
    identity: bytes = b"",
    keys: CurveKeys | None = None,
) -> Channel[Any]:
    """A DEALER; it reconnects by itself when the ROUTER's process is started again, queueing sends meanwhile.

    Raises ConfigError for tcp without a client's keys.
    """
    socket = _socket(context, zmq.DEALER, endpoint, keys)
    if identity:
        socket.setsockopt(zmq.IDENTITY, identity)
    if is_tcp(endpoint) and keys is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    socket.connect(endpoint)
    return Channel(socket, receives)


def worker_identity(group: int, rank: int, group_epoch: int) -> bytes:
    """The plans-link identity of a rank: a new epoch is a new peer."""
    return f"worker-{group}-{rank}-{group_epoch}".encode()


OUTPUT_IDENTITY = b"output"
SCHEDULER_IDENTITY = b"scheduler"
