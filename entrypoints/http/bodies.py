"""Reads a request's body, JSON, multipart or urlencoded, into its struct. A null is an absent field."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import UploadFile
from starlette.requests import Request

from safelight.entrypoints.http.schemas import IGNORED
from safelight.runtime.errors import InvalidRequest

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
FILES = ("image", "image[]", "input_reference")  # what may be a file in a form, in this order
LISTS = frozenset({*FILES, "url", "url[]"})  # and may be there several times
_REFUSED: Mapping[str, str] = MappingProxyType({
    "image": "a picture to start from is for /v1/images/edits",
    "image[]": "pictures to start from are for /v1/images/edits",
    "input_reference": "a picture to start from is for /v1/videos, or image of /v1/images/edits",
    "mask": "this server edits whole pictures; leave the mask out",
})  # fmt: skip
_PATH = re.compile(r"`\$\.(?P<at>\w+)|missing required field `(?P<missing>\w+)`")
_WARNING_LENGTH = 1000
Body = TypeVar("Body", bound=msgspec.Struct)


async def read(request: Request, kind: type[Body]) -> tuple[Body, list[str]]:
    """The body and what to warn of. Raises InvalidRequest naming the parameter."""
    body, _files, warnings = await read_with_files(request, kind)
    return body, warnings


async def read_with_files(request: Request, kind: type[Body]) -> tuple[Body, tuple[bytes, ...], list[str]]:
    """As `read`, and the files of a form; what clients call them, and say of their type, is not looked at."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = content_type in FORMS
    known = set(kind.__struct_encode_fields__)
    values, files = await _form(request, known) if form else (_json(await request.body()), ())
    values = {name: value for name, value in values.items() if value is not None}
    for name in _REFUSED.keys() & values.keys() - known:
        raise _refused(name)
    unknown = sorted(values.keys() - known - IGNORED)
    try:
        body = msgspec.convert({k: v for k, v in values.items() if k in known}, kind, strict=not form)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    return body, files, [f"unknown field {name!r} was ignored{_near(name, known)}" for name in unknown]


def _near(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def invalid(error: msgspec.ValidationError) -> InvalidRequest:
    """The refusal for what msgspec says."""
    message = str(error)
    found = _PATH.search(message)
    return InvalidRequest(message, param=(found["at"] or found["missing"]) if found else None)


def warning_header(warnings: list[str]) -> dict[str, str]:
    """Header values are ASCII without control characters."""
    if not warnings:
        return {}
    text = "; ".join(warnings).encode("ascii", "backslashreplace").decode()
    return {"x-safelight-warning": re.sub(r"[^\x20-\x7e]", "?", text)[:_WARNING_LENGTH]}


def _json(content: bytes) -> dict[str, Any]:
    try:
        values = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"a JSON object expected as the body: {error}") from None
    if not isinstance(values, dict):
        raise InvalidRequest(f"a JSON object expected as the body, got {type(values).__name__}")
    return values


def _refused(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {_REFUSED.get(name, 'text expected, got a file')}", param=name)


async def _form(request: Request, known: set[str]) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    async with request.form(max_files=20, max_fields=200) as form:
        values: dict[str, Any] = {}
        files: dict[str, list[bytes]] = {name: [] for name in FILES}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in FILES or name not in known:
                    raise _refused(name)
                files[name].append(await value.read())
            elif name in LISTS and name in known:
                values.setdefault(name, []).append(value)
            elif name in values:
                raise InvalidRequest(f"{name} is there twice", param=name)
            else:
                values[name] = value
        return values, tuple(content for name in FILES for content in files[name])
