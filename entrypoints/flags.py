"""Command-line flags made of the configs' options: one declaration, one flag, one config-file key."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from safelight.configs.config_file import load_config
from safelight.configs.env import from_environment
from safelight.configs.options import base_types, flag


def with_flags(panels: dict[str, type]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command whose **given receives one flag per field of the dataclasses, None where it was not given.

    `panels` maps the heading in --help to a dataclass of options; parameters that the command declares itself stay.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        declared = inspect.signature(command, eval_str=True)
        own = [p for p in declared.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [_parameter(field, kind, panel) for panel, config in panels.items() for field, kind in _fields(config)]
        command.__signature__ = declared.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
        command.configs = tuple(panels.values())  # type: ignore[attr-defined]  # for `parsed`
        return command

    return decorate


def merged(given: dict[str, Any], config: Path | None, configs: Sequence[type]) -> list[dict[str, Any]]:
    """The values for each of `configs`: command line over config file over environment; absent ones are left out."""
    known = {field.name for kind in configs for field in dataclasses.fields(kind)}
    values = {name: value for name, value in from_environment(os.environ).items() if name in known}
    values |= load_config(config, configs) if config else {}
    values |= {name: value for name, value in given.items() if value is not None and value not in ([], ())}
    return [{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values} for kind in configs]


def parsed(app: typer.Typer, name: str, argv: Sequence[str]) -> list[tuple[type, dict[str, Any]]]:
    """The values that a command made by `with_flags` would run with, by dataclass, without running it.

    Raises ConfigError, or SystemExit after it has printed a help text or a usage error.
    """
    group = typer.main.get_group(app)
    command = group.commands[name]
    configs: tuple[type, ...] = command.callback.configs  # type: ignore[union-attr]
    found: list[dict[str, Any]] = []
    command.callback = lambda **given: found.append(given)  # of this group alone, which was made just now
    try:
        group.main([name, *argv], prog_name="safelight")
    except SystemExit:
        if not found:
            raise
    [given] = found
    return list(zip(configs, merged(given, given.pop("config", None), configs), strict=True))


def _fields(config: type) -> list[tuple[dataclasses.Field[Any], type]]:
    kinds = base_types(config)
    return [(field, kinds[field.name]) for field in dataclasses.fields(config) if not field.metadata["file_only"]]


def _parameter(field: dataclasses.Field[Any], kind: type, panel: str) -> inspect.Parameter:
    name, choices = flag(field.name), field.metadata["choices"]
    shown = "" if field.default in (None, "", ()) or kind is bool else f" (default: {field.default})"
    option = typer.Option(
        f"{name}/--no-{name[2:]}" if field.default is True else name,
        help=field.metadata["help"] + shown,
        metavar="|".join(choices) or None,
        show_default=False,
        rich_help_panel=panel,
    )
    given: Any = list[str] if kind is tuple else kind  # a list: the flag may be repeated
    annotation = Annotated[Optional[given], option]  # noqa: UP045
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
