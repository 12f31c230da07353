"""Reads a request's body, JSON, multipart or urlencoded, into its struct. A null is an absent field."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import UploadFile
from starlette.requests import Request

from safelight.entrypoints.http.schemas import IGNORED
from safelight.runtime.errors import InvalidRequest

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
FILES = frozenset({"input_reference", "image", "image[]", "mask"})
_PATH = re.compile(r"`\$\.(?P<at>\w+)|missing required field `(?P<missing>\w+)`")
_WARNING_LENGTH = 1000
Body = TypeVar("Body", bound=msgspec.Struct)


async def read(request: Request, kind: type[Body]) -> tuple[Body, list[str]]:
    """The body and what to warn of. Raises InvalidRequest naming the parameter."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = content_type in FORMS
    values = await _form(request) if form else _json(await request.body())
    values = {name: value for name, value in values.items() if value is not None}
    known = set(kind.__struct_fields__)
    for name in FILES & values.keys():
        raise InvalidRequest(f"{name}: requests cannot bring pictures yet; leave it out", param=name)
    unknown = sorted(values.keys() - known - IGNORED)
    try:
        body = msgspec.convert({k: v for k, v in values.items() if k in known}, kind, strict=not form)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    return body, [f"unknown field {name!r} was ignored{_near(name, known)}" for name in unknown]


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


async def _form(request: Request) -> dict[str, Any]:
    async with request.form(max_files=8, max_fields=200) as form:
        values: dict[str, Any] = {}
        for name, value in form.multi_items():
            if name in values:
                raise InvalidRequest(f"{name} is there twice", param=name)
            values[name] = value.filename if isinstance(value, UploadFile) else value
        return values
