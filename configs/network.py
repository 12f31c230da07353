"""Endpoints and network interfaces as flags name them."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

from safelight.configs.options import flag
from safelight.runtime.errors import ConfigError

_LAST_PORT = 65_533  # two more ports follow
_SIOCGIFADDR = 0x8915  # netdevice(7): the IPv4 address of an interface


def check_endpoint(name: str, endpoint: str, keys: str | None) -> None:
    """Raises ConfigError unless `endpoint` is ipc://PATH, or tcp://HOST:PORT with keys."""
    if endpoint.startswith("ipc://") and endpoint != "ipc://":
        return
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not host or not port.isdecimal() or not 0 < int(port) <= _LAST_PORT:
        raise ConfigError(
            f"{flag(name)}: tcp://HOST:PORT with a port up to {_LAST_PORT} expected, got {endpoint!r}", param=name
        )
    if keys is None:
        raise ConfigError(
            f"{flag(name)} {endpoint}: tcp needs --keys DIR, so that only known hosts connect; `safelight keys DIR` "
            "makes them",
            param="keys",
        )


def check_address(host: str) -> None:
    """Raises ConfigError unless `host` is the address of one interface: others are told to connect to it."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        address = None
    if address is None or address.is_unspecified:
        raise ConfigError(
            f"--worker-endpoint: the numeric address of a private interface of this host expected, got {host!r}",
            param="worker_endpoint",
        )


def check_interface(name: str) -> None:
    """Raises ConfigError for an interface that this host does not have."""
    known = [found for _, found in socket.if_nameindex()]
    if name not in known:
        raise ConfigError(
            f"--interface: this host has no network interface {name!r}; it has {', '.join(known)}", param="interface"
        )


def interface_address(name: str) -> str:
    """The IPv4 address of an interface. Raises ConfigError."""
    check_interface(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError as error:
            raise ConfigError(f"--interface {name}: it has no IPv4 address: {error}", param="interface") from error
    return socket.inet_ntoa(answer[20:24])


def address_towards(host: str, port: int) -> str:
    """This host's address on the way to another one. Raises ConfigError when there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"no route to {host}: {error}; name the way with --interface", param="interface") from error


def free_ports(address: str, count: int) -> int:
    """The first of `count` ports in a row that are free now. Raises ConfigError when none is found."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind((address, 0))
            first = int(probe.getsockname()[1])
        if first > _LAST_PORT:
            continue
        taken = [socket.socket() for _ in range(count)]
        try:
            for i, probe in enumerate(taken):
                probe.bind((address, first + i))
            return first
        except OSError:
            continue
        finally:
            for probe in taken:
                probe.close()
    raise ConfigError(f"no {count} free ports in a row at {address}; name one with --worker-endpoint")
