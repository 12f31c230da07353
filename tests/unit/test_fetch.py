"""Pictures from addresses: only of the public internet, checked once and connected to what was checked, bounded."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from safelight.entrypoints.http.addresses import UrlPolicy, checked_address, is_public, parse
from safelight.entrypoints.http.fetch import fetch, resolve
from safelight.runtime.errors import InvalidRequest

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


# ---- addresses


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "193.0.6.139", "2606:4700:4700::1111", "2a00:1450:4001::64"])
def test_public_addresses_are_accepted(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "0.0.0.0", "0.1.2.3",
        "169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1", "192.88.99.1",
        "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
        "168.63.129.16", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1",
        "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "fc00::1", "fd00:ec2::254",
        "fe80::1", "fe80::1%eth0", "2606:4700::1%1", "fec0::1", "ff02::1", "", "localhost", "1.1.1", "01.1.1.1",
    ],
)  # fmt: skip
def test_addresses_of_anything_else_are_not(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.0.0.1.",
        "0", "localhost", "LOCALHOST", "localhost.", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
        "[0:0:0:0:0:0:0:1]", "[::127.0.0.1]", "169.254.169.254", "0xa9fea9fe", "2852039166",
    ],
)  # fmt: skip
def test_every_spelling_of_a_local_address_is_refused(host: str) -> None:
    """By the system's own resolver, which takes them all."""
    policy = UrlPolicy(allowed=True)

    async def check() -> None:
        await checked_address(parse(f"http://{host}/", policy, "url"), policy, resolve, "url")

    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(check())
    assert caught.value.param == "url"
    assert "127.0.0.1" not in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.org/x", "file:///etc/passwd", "gopher://a.org", "//a.org/x", "a.org/x", "http:///x", "http://",
        "http://me@a.org/", "http://me:pw@a.org/", "http://a.org@127.0.0.1/", "http://@a.org", "http://a.org:22/",
        "http://a.org:8080/", "https://a.org:0/", "http://a.org:99999/", "http://a.org:x/", "http://[::1", "http://[v1.a]/",
        "http://[fe80::1%25eth0]/", "http://a b.org/", "http://a.org/\r\nHost: x", "http://a.org/\t", "http://ä.org/",
        "http://a.org\\@127.0.0.1/", "http://a.org/" + "x" * 5000,
    ],
)  # fmt: skip
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(url, UrlPolicy(allowed=True), "url")
    assert caught.value.param == "url"


def test_urls_are_taken_apart() -> None:
    policy = UrlPolicy(allowed=True)
    for url, expected in {
        "http://A.org.": ("a.org", 80, False, "/", "a.org"),
        "https://a.org:443/b?c=%20d#e": ("a.org", 443, True, "/b?c=%20d", "a.org"),
        "http://a.org:443": ("a.org", 443, False, "/", "a.org:443"),
        "http://[2606:4700::1]/x": ("2606:4700::1", 80, False, "/x", "[2606:4700::1]"),
    }.items():
        found = parse(url, policy, "url")
        assert (found.host, found.port, found.secure, found.path, found.authority) == expected


def test_one_local_address_among_others_refuses_a_name() -> None:
    policy = UrlPolicy(allowed=True)
    target = parse("http://a.org", policy, "url")

    async def check(*addresses: str) -> str:
        async def names(host: str, port: int) -> tuple[str, ...]:
            return addresses

        return await checked_address(target, policy, names, "url")

    assert asyncio.run(check("8.8.8.8", "1.1.1.1")) == "8.8.8.8"
    for addresses in ((), ("8.8.8.8", "10.0.0.1"), ("::ffff:10.0.0.1",)):
        with pytest.raises(InvalidRequest):
            asyncio.run(check(*addresses))


# ---- fetching from a server on this host, which a policy of the test accepts


def ok(content: bytes, *headers: str) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(content)}", *headers]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)

    return answer


def moved(location: str) -> Answer:
    return raw(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())


def raw(content: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(content)

    return answer


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        await writer.drain()


async def dripping(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)


class Server:
    """Answers by path; `asked` is what it was asked, `names` what the resolver was."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers, self.port = answers, 0
        self.asked: list[str] = []
        self.names: list[str] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.asked.append(head)
            await self.answers[head.split()[1]](writer)
            await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def get(self, path: str, **changes: Any) -> bytes:
        policy = UrlPolicy(True, lambda address: address == "127.0.0.1", frozenset((self.port,)), total_s=5.0)
        policy = dataclasses.replace(policy, **changes)

        async def look_up(host: str, port: int) -> list[str]:
            self.names.append(host)
            return {"evil.org": ["10.0.0.1"]}.get(host, ["127.0.0.1"])

        return await fetch(f"http://pictures.org:{self.port}{path}", policy, 100_000, "url", look_up)


def with_server(answers: dict[str, Answer], use: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        server = Server(answers)
        async with server.running():
            await use(server)

    asyncio.run(run())


def test_a_picture_is_fetched_also_in_chunks_and_after_redirects_each_name_resolved_once() -> None:
    async def use(server: Server) -> None:
        server.answers["/away"] = moved(f"http://other.org:{server.port}/plain?x")
        assert await server.get("/plain?x") == b"content"
        head = server.asked[0].lower()
        assert f"host: pictures.org:{server.port}\r\n" in head
        assert not any(word in head for word in ("cookie", "authorization", "referer"))
        assert await server.get("/chunks") == b"content"
        assert await server.get("/early") == b"content"
        server.names.clear()
        assert await server.get("/three") == b"content"
        assert server.names == ["pictures.org"] * 3 + ["other.org"]

    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ncont\r\n3\r\nent\r\n0\r\n\r\n"
    early = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.0 200 OK\r\n\r\ncontent"
    answers = {"/plain?x": ok(b"content", "Content-Type: text/html"), "/chunks": raw(chunks), "/early": raw(early)}
    with_server(answers | {"/three": moved("two"), "/two": moved("/away")}, use)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/loop", "at most 3 redirects"),
        ("/evil", "public internet"),
        ("/file", "http:, https: or data:"),
        ("/port", "port"),
        ("/user", "without user"),
        ("/missing", "answered 404"),
        ("/long", "at most 100000 bytes"),
        ("/endless", "at most 100000 bytes"),
        ("/gzip", "compressed"),
        ("/cut", "could not be fetched"),
        ("/nonsense", "could not be fetched"),
        ("/headers", "could not be fetched"),
        ("/slow", "within 0.4 s"),
        ("/nothing", "within 0.4 s"),
    ],
)
def test_what_an_address_may_not_answer(path: str, message: str) -> None:
    async def silence(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.0)

    async def use(server: Server) -> None:
        server.answers["/evil"] = moved(f"http://evil.org:{server.port}/")
        with pytest.raises(InvalidRequest, match=message) as caught:
            await server.get(path, total_s=0.4 if "within" in message else 5.0)
        assert caught.value.param == "url"
        assert "10.0.0.1" not in caught.value.message

    answers: dict[str, Answer] = {
        "/loop": moved("/loop"), "/file": moved("file:///etc/passwd"), "/port": moved("http://pictures.org:22/"),
        "/user": moved("http://a:b@pictures.org/"), "/missing": raw(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"),
        "/long": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n"), "/endless": endless,
        "/gzip": ok(b"x", "Content-Encoding: gzip"), "/cut": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"),
        "/nonsense": raw(b"SSH-2.0-OpenSSH\r\n"), "/headers": raw(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000),
        "/slow": dripping, "/nothing": silence,
    }  # fmt: skip
    with_server(answers, use)


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that changes its mind is not asked again."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a second resolution")

    async def use(server: Server) -> None:
        loop_resolves = asyncio.get_running_loop().getaddrinfo

        async def numbers_only(host: Any, *rest: Any, **more: Any) -> Any:
            assert host == "127.0.0.1"
            return await loop_resolves(host, *rest, **more)

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", numbers_only)
        assert await server.get("/a") == b"content"

    monkeypatch.setattr(socket, "gethostbyname", forbidden)
    with_server({"/a": ok(b"content")}, use)


def test_nothing_is_fetched_unless_allowed() -> None:
    async def use(server: Server) -> None:
        with pytest.raises(InvalidRequest, match="--allow-url-inputs"):
            await server.get("/a", allowed=False)
        assert not server.asked
        assert not server.names

    with_server({}, use)


def test_https_is_tls_from_the_first_byte_on() -> None:
    heard: list[bytes] = []

    async def answer_plainly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1000))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer_plainly, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        policy = UrlPolicy(True, lambda address: True, frozenset((port,)), total_s=5)

        async def look_up(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        with pytest.raises(InvalidRequest, match="could not be fetched"):
            await fetch(f"https://pictures.org:{port}/a", policy, 100, "url", look_up)
        server.close()

    asyncio.run(run())
    assert b"pictures.org" in heard[0], "the name that the certificate has to have"
    assert b"GET" not in heard[0]
