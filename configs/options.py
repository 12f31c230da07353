"""Options: dataclass fields that are at once a command-line flag, a key of a config file and a checked value.

One declaration holds an option's type, default, help and choices; flags, config files and documentation are derived.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safelight.runtime.errors import SafelightError

_KINDS = {
    int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "names and values",
    tuple: "a string or a list of strings",
}  # fmt: skip

# What else than a value of the type itself is taken.
_ACCEPTED: Mapping[type, Any] = types.MappingProxyType({float: (int, float), tuple: (str, list, tuple)})


def option(
    default: Any, text: str, *, choices: tuple[str, ...] = (), minimum: float | None = None, file_only: bool = False
) -> Any:
    """A dataclass field with its help text and what values it takes; `file_only`: a key of config files, no flag."""
    metadata = {"help": text, "choices": choices, "minimum": minimum, "file_only": file_only}
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def base_types(config: type) -> dict[str, type]:
    """The plain type (int, float, bool, str, dict; tuple: of strings) of each field, without `| None`."""
    found = {}
    for name, hint in typing.get_type_hints(config).items():
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        member = next(member for member in members if member is not types.NoneType)
        found[name] = typing.get_origin(member) or member
    return found


def flag(name: str) -> str:
    """The command-line spelling of a field: `num_frames` is `--num-frames`."""
    return "--" + name.replace("_", "-")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, or the list of all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(names)}"


def check_value(name: str, kind: type, metadata: Mapping[str, Any], value: Any, error: type[SafelightError]) -> None:
    """Raises `error` unless `value` is of `kind`, one of the choices and not below the minimum. An int is a float."""
    accepted = _ACCEPTED.get(kind, kind)
    several = value if isinstance(value, list | tuple) else ()
    if (
        not isinstance(value, accepted)
        or (isinstance(value, bool) and kind is not bool)
        or not all(isinstance(one, str) for one in several)
    ):
        raise error(f"{flag(name)}: {_KINDS[kind]} expected, got {value!r}", param=name)
    choices, minimum = metadata.get("choices", ()), metadata.get("minimum")
    if choices and value not in choices:
        raise error(
            f"{flag(name)}: one of {', '.join(choices)} expected, got {value!r}{did_you_mean(str(value), choices)}",
            param=name,
        )
    if minimum is not None and not value >= minimum:
        raise error(f"{flag(name)}: at least {minimum:g} expected, got {value!r}", param=name)


def as_tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    """The strings of an option that may be given several times; an empty one is none."""
    return tuple(one for one in ([value] if isinstance(value, str) else value) if one)


def check_options(config: Any, error: type[SafelightError]) -> None:
    """Checks every field of a dataclass of options; None is accepted where it is the default."""
    kind: Any = type(config)
    kinds = base_types(kind)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None or field.default is not None:
            check_value(field.name, kinds[field.name], field.metadata, value, error)
