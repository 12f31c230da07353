"""Typed, checksummed messages over ROUTER and DEALER."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from safelight.runtime import transport
from safelight.runtime.errors import ConfigError, ProtocolError, StartupError
from safelight.runtime.messages import Cancel, CancelAccepted, FromScheduler, ToScheduler


class Wires:
    """Channels of one test, closed after it."""

    def __init__(self, stack: ExitStack) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(self.context.destroy, 0)
        self.stack = stack

    def router(self, endpoint: str = "inproc://a") -> transport.Channel[Any]:
        return self.stack.enter_context(transport.bind_router(self.context, endpoint, ToScheduler))

    def dealer(self, identity: bytes = b"") -> transport.Channel[Any]:
        return self.stack.enter_context(transport.connect_dealer(self.context, "inproc://a", FromScheduler, identity))


@pytest.fixture
def wires() -> Iterator[Wires]:
    with ExitStack() as stack:
        yield Wires(stack)


def wait(channel: transport.Channel[Any], count: int = 1) -> list[transport.Received[Any]]:
    found: list[transport.Received[Any]] = []
    while len(found) < count:
        assert channel.socket.poll(5000), "a message within 5 s"
        found += channel.receive_all()
    return found


def test_a_message_and_its_frames_arrive_and_can_be_answered(wires: Wires) -> None:
    router = wires.router()
    dealer = wires.dealer(b"me")
    dealer.send(Cancel("job", "owner"), frames=[b"media", memoryview(b"more")])
    [received] = wait(router)
    assert (received.identity, received.message) == (b"me", Cancel("job", "owner"))
    assert [bytes(f) for f in received.frames] == [b"media", b"more"]
    router.send(CancelAccepted("job"), received.identity)
    assert [r.message for r in wait(dealer)] == [CancelAccepted("job")]


def test_a_send_without_a_route_is_an_error(wires: Wires) -> None:
    router = wires.router()
    with pytest.raises(transport.PeerUnreachable, match="no route"):
        router.send(CancelAccepted("job"), b"nobody")


def test_malformed_messages_are_counted_and_the_next_good_one_arrives(wires: Wires) -> None:
    router = wires.router()
    dealer = wires.dealer()
    good = transport.encode(Cancel("job", "owner"))
    for bad in (b"", b"junk", good[:-1], transport.encode(CancelAccepted("job")), good[:9] + b"\xff" + good[10:]):
        dealer.socket.send(bad)
    dealer.send(Cancel("job", "owner"))
    assert [r.message for r in wait(router)] == [Cancel("job", "owner")]
    assert router.refused == 5


@given(st.data())
def test_no_flipped_bit_is_accepted(data: st.DataObject) -> None:
    envelope = bytearray(transport.encode(Cancel("01J", "owner", reason="why not")))
    place = data.draw(st.integers(0, len(envelope) * 8 - 1))
    envelope[place // 8] ^= 1 << place % 8
    with pytest.raises(ProtocolError):
        transport.decode(msgspec.msgpack.Decoder(ToScheduler), bytes(envelope))


def test_a_taken_or_foreign_endpoint_is_a_clear_error(wires: Wires) -> None:
    wires.router()
    with pytest.raises(StartupError, match="another server"):
        wires.router()
    with pytest.raises(ConfigError, match="ipc://"):
        wires.router("udp://0.0.0.0:1")
