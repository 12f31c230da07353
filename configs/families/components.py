"""Component configs of a checkpoint in diffusers format, read and checked without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safelight.runtime.errors import ModelError


def read_component(
    root: Path, folder: str, fields: Mapping[str, Any], lists: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Any]:
    """`folder`/config.json with every one of `fields` a positive integer, or a list of `lists[field]` of them (0: of
    any number).

    fields: the value of one that may be absent (what its class takes then), or None for one that must be there.
    Raises ModelError naming file and field.
    """
    path = root / folder / "config.json"
    values = read_settings(path)
    for name, default in fields.items():
        value = values.setdefault(name, default)
        numbers = [value] if name not in lists else value if isinstance(value, list) else []
        count = lists.get(name, 1) or max(1, len(numbers))
        if len(numbers) != count or any(type(number) is not int or number < 1 for number in numbers):
            kind = f"a list of {lists[name] or 'some'} positive integers" if name in lists else "a positive integer"
            raise ModelError(f"{path}: {name} must be {kind}, got {value!r}", param="model_path")
    return values


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object that is not empty. Raises ModelError naming the file."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; a complete checkpoint in diffusers format is needed", param="model_path")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}", param="model_path") from error
    if not isinstance(values, dict) or not values:
        raise ModelError(f"{path} must be a JSON object with the component's settings", param="model_path")
    return values
