"""What diffusers' pipelines take, read from their source: nothing of diffusers (or torch) is imported or executed."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight.configs.options import did_you_mean
from safelight.runtime.errors import ModelError


@dataclass(frozen=True, slots=True)
class CallSignature:
    """The parameters of a pipeline's `__call__`. `defaults`: of those that have one, None where it is no literal."""

    name: str  # of the class
    required: tuple[str, ...]
    defaults: Mapping[str, Any]

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.required or parameter in self.defaults

    def number(self, *parameters: str) -> int | float | None:
        """The first default of these that is a number."""
        for parameter in parameters:
            value = self.defaults.get(parameter)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return value
        return None


def signature_of(class_name: str) -> CallSignature:
    """Of a pipeline class of the installed diffusers. Raises ModelError: not installed, no such pipeline."""
    folder = diffusers_folder() / "pipelines"
    found = _class(class_name, folder)
    if found is None or not class_name.endswith("Pipeline"):
        raise ModelError(
            f"model_index.json names the pipeline class {class_name!r}, which the installed diffusers does not have"
            f"{did_you_mean(class_name, _pipelines(folder))}",
            param="model_path",
        )
    return _signature(class_name, found, folder)


def signature_in(path: Path, class_name: str) -> CallSignature:
    """Of a pipeline class in a checkpoint's own Python file. Raises ModelError."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ModelError(f"{path} cannot be read as Python: {error}", param="model_path") from error
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name), None)
    if found is None:
        raise ModelError(f"{path} has no class {class_name}, which model_index.json names", param="model_path")
    return _signature(class_name, found, diffusers_folder() / "pipelines")


def diffusers_folder() -> Path:
    """Where diffusers is installed, found without importing it. Raises ModelError."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        raise ModelError("--backend diffusers needs the package diffusers, which is not installed", param="backend")
    return Path(spec.origin).parent


def _signature(name: str, found: ast.ClassDef, folder: Path) -> CallSignature:
    call = _call(found, folder)
    if call is None:
        raise ModelError(f"the pipeline class {name} has no __call__", param="model_path")
    arguments = call.args
    ordered = [a.arg for a in (*arguments.posonlyargs, *arguments.args)][1:]  # without self
    split = len(ordered) - len(arguments.defaults)
    defaults = dict(zip(ordered[split:], map(_literal, arguments.defaults), strict=True))
    required = ordered[:split]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is None:
            required.append(argument.arg)
        else:
            defaults[argument.arg] = _literal(default)
    return CallSignature(name, tuple(required), defaults)


def _call(found: ast.ClassDef, folder: Path) -> ast.FunctionDef | None:
    """`__call__` of a class, or of the first of its bases that has one."""
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__call__":
            return node
    for base in found.bases:
        if isinstance(base, ast.Name) and base.id.endswith("Pipeline") and base.id != "DiffusionPipeline":
            parent = _class(base.id, folder)
            if parent is not None and (call := _call(parent, folder)) is not None:
                return call
    return None


def _class(name: str, folder: Path) -> ast.ClassDef | None:
    pattern = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    for text in _sources(folder):
        if pattern.search(text):
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return node
    return None


def _pipelines(folder: Path) -> set[str]:
    return {name for text in _sources(folder) for name in re.findall(r"^class (\w+Pipeline)\b", text, re.MULTILINE)}


def _sources(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("pipeline_*.py")):
        yield path.read_text(encoding="utf-8")


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
