"""Fetches a picture from an address that a client names, as far as the policy allows.

A name is resolved once and the connection goes to the address that was checked, so that a name cannot change its mind
between the two (DNS rebinding). Nothing of this host is used: no proxy, no cookies, no credentials.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Sequence
from urllib.parse import urljoin

import h11

from safelight.entrypoints.http.addresses import Resolve, Target, UrlPolicy, checked_address, parse
from safelight.runtime.errors import InvalidRequest

_READ = 1 << 16
_HEADERS = 1 << 14
_MOVED = (301, 302, 303, 307, 308)


class _Moved(Exception):
    def __init__(self, location: str) -> None:
        self.location = location


async def resolve(host: str, port: int) -> Sequence[str]:
    """Every address of a name. Numbers in any spelling that the system takes are addresses too."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def fetch(url: str, policy: UrlPolicy, most_bytes: int, param: str, look_up: Resolve = resolve) -> bytes:
    """The content at an http or https address, whatever its type is said to be.

    Raises InvalidRequest naming `param`: not allowed, too large, too slow, too many redirects, another status than 200.
    """
    if not policy.allowed:
        raise InvalidRequest(
            f"{param}: this server fetches nothing (it was started without --allow-url-inputs); send the file, or a "
            "data: URL",
            param=param,
        )
    try:
        async with asyncio.timeout(policy.total_s):
            for _ in range(1 + policy.redirects):
                target = parse(url, policy, param)
                address = await checked_address(target, policy, look_up, param)
                try:
                    return await _get(target, address, most_bytes, param)
                except _Moved as moved:
                    url = urljoin(url, moved.location)
    except TimeoutError:
        raise InvalidRequest(f"{param}: the picture did not come within {policy.total_s:g} s", param=param) from None
    except (OSError, ValueError, h11.ProtocolError, EOFError):  # what exactly, would tell of our network
        raise InvalidRequest(f"{param}: the picture could not be fetched", param=param) from None
    raise InvalidRequest(f"{param}: at most {policy.redirects} redirects expected", param=param)


async def _get(target: Target, address: str, most_bytes: int, param: str) -> bytes:
    secure = ssl.create_default_context() if target.secure else None
    name = target.host if target.secure else None
    reader, writer = await asyncio.open_connection(address, target.port, ssl=secure, server_hostname=name, limit=_READ)
    try:
        return await _exchange(target, reader, writer, most_bytes, param)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _exchange(
    target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most_bytes: int, param: str
) -> bytes:
    talk = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEADERS)
    headers = [("Host", target.authority), ("User-Agent", "safelight"), ("Accept", "image/*"),
               ("Accept-Encoding", "identity"), ("Connection", "close")]  # fmt: skip
    writer.write(talk.send(h11.Request(method="GET", target=target.path, headers=headers)) or b"")
    writer.write(talk.send(h11.EndOfMessage()) or b"")
    await writer.drain()
    content = bytearray()
    while True:
        event = talk.next_event()
        if event is h11.NEED_DATA:
            talk.receive_data(await reader.read(_READ))
        elif isinstance(event, h11.Response):
            _check(event, most_bytes, param)
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > most_bytes:
                raise _too_large(most_bytes, param)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(content)
        elif not isinstance(event, h11.InformationalResponse):
            raise EOFError


def _check(response: h11.Response, most_bytes: int, param: str) -> None:
    headers = {bytes(name).lower(): bytes(value) for name, value in response.headers}
    if response.status_code in _MOVED and b"location" in headers:
        raise _Moved(headers[b"location"].decode("latin-1"))
    if response.status_code != 200:
        raise InvalidRequest(f"{param}: the address answered {response.status_code}", param=param)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise InvalidRequest(f"{param}: the address answered compressed content, which is not taken", param=param)
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > most_bytes:
        raise _too_large(most_bytes, param)


def _too_large(most_bytes: int, param: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: at most {most_bytes} bytes expected", param=param)
