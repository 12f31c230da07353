"""/openapi.json, made of the operations and their msgspec structs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

import safelight
from safelight.entrypoints.http.routes import JSON, SSE, TEXT, Operation
from safelight.entrypoints.http.schemas import ErrorReply, Health, ImageEvent, VideoProgress

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


def document(operations: Sequence[Operation], *, keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document; `keys`: whether API keys are asked for."""
    structs: list[type[msgspec.Struct]] = [ErrorReply, Health, ImageEvent, VideoProgress]
    for operation in operations:
        structs += [kind for kind in (operation.body, *operation.replies.values(), *operation.also.values()) if kind]
    _, components = msgspec.json.schema_components(
        list(dict.fromkeys(structs)), ref_template="#/components/schemas/{name}"
    )
    for body in {operation.body for operation in operations if operation.body is not None}:
        _allow_nulls(components[body.__name__])
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = re.sub(r":path}", "}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, keys=keys)
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Safelight", "version": safelight.__version__, "description": "Pictures and videos."},
        "paths": paths,
        "components": {"schemas": components},
    }
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _allow_nulls(schema: dict[str, Any]) -> None:
    """In requests a null is an absent field."""
    for name, values in schema["properties"].items():
        nullable = {"type": "null"} in values.get("anyOf", ())
        if name not in schema.get("required", ()) and not nullable:
            default = {"default": values.pop("default")} if "default" in values else {}
            schema["properties"][name] = {"anyOf": [values, {"type": "null"}], **default}


def _operation(operation: Operation, *, keys: bool) -> dict[str, Any]:
    replies: dict[str, Any] = {"200": _reply("done", operation.replies)}
    for status, kind in operation.also.items():
        media = {JSON: kind} if kind else operation.replies
        replies[str(status)] = _reply("partly, or not well", media)
    error = {"description": "an error", "content": {JSON: {"schema": _ref(ErrorReply)}}, "headers": _headers()}
    replies["4XX"] = error
    replies["5XX"] = error
    found: dict[str, Any] = {
        "operationId": operation.handler.__name__,
        "summary": operation.summary,
        "parameters": [*_path_parameters(operation.path), *_query_parameters(operation)],
        "responses": replies,
    }
    if operation.body is not None:
        types = (JSON, *_FORMS) if operation.forms else (JSON,)
        content = {media: {"schema": _ref(operation.body)} for media in types}
        if operation.files:
            content[_FORMS[0]] = {"schema": _with_files(operation.body, operation.files)}
        found["requestBody"] = {"required": True, "content": content}
    if keys and not operation.is_open:
        found["security"] = [{"key": []}]
    return found


def _with_files(body: type[msgspec.Struct], files: tuple[str, ...]) -> dict[str, Any]:
    """The schema of a body as a form, whose pictures are files."""
    _, components = msgspec.json.schema_components([body])
    schema = dict(components[body.__name__])
    file = {"type": "string", "format": "binary"}
    picture = {"anyOf": [file, {"type": "array", "items": file}], "description": "PNG, JPEG or WebP"}
    _allow_nulls(schema)
    return {**schema, "properties": {**schema["properties"], **dict.fromkeys(files, picture)}}


def _reply(description: str, media: Mapping[str, type[msgspec.Struct] | None]) -> dict[str, Any]:
    content = {name: {"schema": _ref(kind)} if kind else _raw(name) for name, kind in media.items()}
    return {"description": description, "content": content, "headers": _headers()}


def _raw(media: str) -> dict[str, Any]:
    if media == SSE:
        # OpenAPI 3.1 has no schema for events: PartialImage, ImageEvent; VideoProgress, VideoPreview, Video
        return {}
    return {"schema": {"type": "string"} if media == TEXT else {"type": "string", "format": "binary"}}


def _headers() -> dict[str, Any]:
    return {"x-request-id": {"schema": {"type": "string"}, "required": True, "description": "names this reply in logs"}}


def _path_parameters(path: str) -> list[dict[str, Any]]:
    names = re.findall(r"{(\w+)(?::path)?}", path)
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
    ]


def _query_parameters(operation: Operation) -> list[dict[str, Any]]:
    return [
        {"name": p.name, "in": "query", "required": False, "schema": dict(p.schema), "description": p.description}
        for p in operation.parameters
    ]


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
