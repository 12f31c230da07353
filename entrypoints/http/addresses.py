"""Which addresses a server may fetch pictures from: those of the public internet, however they are spelled."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from safelight.runtime.errors import InvalidRequest

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
MAX_URL = 4096
# Beyond what `ipaddress` knows as not global in every Python from 3.11 on: protocol assignments, relays of 6to4, the
# metadata of a cloud, and IPv6 that carries an IPv4 address for a translator.
_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4",
        "168.63.129.16/32", "::/8", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32",
        "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
    )
)  # fmt: skip


def is_public(text: str) -> bool:
    """Whether an address, as a resolver gives it, is one of the public internet."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        return False
    if any(address.version == network.version and address in network for network in _REFUSED):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """What may be fetched, and how much of it. Tests give one of their own; a server's flags say only `allowed`."""

    allowed: bool = False
    accepts: Callable[[str], bool] = is_public
    ports: frozenset[int] = frozenset((80, 443))
    redirects: int = 3
    total_s: float = 20.0  # of all of it: names, connections, redirects, content


@dataclass(frozen=True, slots=True)
class Target:
    """One http or https address, taken apart."""

    host: str  # as a name or an address, without brackets
    port: int
    secure: bool
    path: str  # with the query

    @property
    def authority(self) -> str:
        """As the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse(url: str, policy: UrlPolicy, param: str) -> Target:
    """Raises InvalidRequest naming `param`: another scheme, a port or credentials that are not taken, nonsense."""

    def refused(why: str) -> InvalidRequest:
        return InvalidRequest(f"{param}: {why}", param=param)

    if len(url) > MAX_URL or any(not 0x20 < ord(letter) < 0x7F for letter in url) or "\\" in url:
        raise refused(f"an address of at most {MAX_URL} printable ASCII characters without spaces expected")
    try:
        parts, host, port = _split(url)
    except ValueError as error:
        raise refused(f"an address expected: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise refused("an http:, https: or data: address expected")
    if "@" in parts.netloc:
        raise refused("an address without user and password expected")
    if not host or "%" in host:
        raise refused("an address with a host expected")
    secure = parts.scheme == "https"
    port = (443 if secure else 80) if port is None else port
    if port not in policy.ports:
        known = " or ".join(str(known) for known in sorted(policy.ports))
        raise refused(f"port {known} expected, got {port}")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(host, port, secure, path)


def _split(url: str) -> tuple[SplitResult, str, int | None]:
    parts = urlsplit(url)
    if "[" in parts.netloc:
        ipaddress.IPv6Address(parts.hostname or "")
    return parts, (parts.hostname or "").rstrip("."), parts.port


async def checked_address(target: Target, policy: UrlPolicy, resolve: Resolve, param: str) -> str:
    """The address to connect to; the name is not resolved again. Raises InvalidRequest.

    One address that is not accepted refuses the name: whoever mixes them wants something.
    """
    try:
        found = await resolve(target.host, target.port)
    except (OSError, UnicodeError):
        found = ()
    if not found:
        raise InvalidRequest(f"{param}: the host of the address is not known", param=param)
    if not all(policy.accepts(address) for address in found):
        raise InvalidRequest(f"{param}: an address of the public internet expected", param=param)
    return found[0]
