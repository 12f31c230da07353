"""`--config FILE`: JSON or YAML with the command line's names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safelight.configs.options import base_types, check_value, did_you_mean
from safelight.runtime.errors import ConfigError


def load_config(path: Path, configs: Sequence[type]) -> dict[str, Any]:
    """The values in the file by field name (`num-frames` and `num_frames` are the same key); null means unset.

    `configs` are the dataclasses of options whose fields are the known keys. Raises ConfigError naming the file and the
    key: unreadable file, unknown key (with the nearest known one), wrong type, a key that is there twice.
    """
    fields = {field.name: field for config in configs for field in dataclasses.fields(config)}
    kinds = {name: kind for config in configs for name, kind in base_types(config).items()}
    found: dict[str, Any] = {}
    for key, value in _parse(path).items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise ConfigError(f"{path}: unknown key {key!r}{did_you_mean(name, fields)}", param=name)
        if name in found:
            raise ConfigError(f"{path}: {key!r} is there twice", param=name)
        if value is not None:
            try:
                check_value(name, kinds[name], fields[name].metadata, value, ConfigError)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error.message}", param=name) from None
        found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def _parse(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} cannot be read: {error}", param="config") from error
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}", param="config") from error
    else:
        import yaml

        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}", param="config") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: names and values expected at the top, got {type(content).__name__}", param="config")
    return content
