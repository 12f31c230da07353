"""Job ids: ULIDs (github.com/ulid/spec): 48 bits of milliseconds, 80 random bits, 26 letters that sort by time."""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_ulid(now_ms: int | None = None) -> str:
    """A new id; `now_ms` is the clock in milliseconds since 1970, for tests."""
    return from_bits((now_ms if now_ms is not None else time.time_ns() // 1_000_000) << 80 | secrets.randbits(80))


def from_bits(value: int) -> str:
    """The id of 128 bits; without a time in them it does not sort."""
    return "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))
