"""Imports point one way (docs/architecture.md), and whole processes never see torch."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safelight

ROOT = Path(next(iter(safelight.__path__)))

# What may be imported by the modules below each prefix; the longest matching prefix counts. `lazy` holds what only the
# functions of a module may import: `launch` imports each process's main inside the function that the child runs.
LEAVES = (
    *("configs", "runtime.errors", "runtime.messages", "runtime.transport", "runtime.curve", "runtime.logs"),
    *("runtime.slots", "runtime.inputs"),
)
FRONT = (*LEAVES, "runtime.launch", "runtime.text", "runtime.hub", "runtime.ulid", "entrypoints")
MODEL = ("configs", "runtime.errors", "runtime.messages", "runtime.pipelines", "runtime.samplers", "runtime.models")
ALLOWED = {
    "configs": ("configs", "runtime.errors"),
    "entrypoints": FRONT,
    "runtime.errors": (),
    "runtime.messages": (),
    "runtime.logs": (),
    "runtime.ulid": (),
    "runtime.hub": ("runtime.errors",),
    "runtime.transport": ("runtime.errors", "runtime.curve"),
    "runtime.curve": ("runtime.errors",),
    "runtime.slots": ("runtime.errors", "runtime.messages"),
    "runtime.inputs": ("runtime.errors", "runtime.messages", "runtime.picture_guard", "runtime.picture_decoder"),
    "runtime.picture_guard": ("runtime.errors", "runtime.picture_decoder"),
    "runtime.picture_decoder": (),
    "runtime.text": ("configs", "runtime.errors", "runtime.text"),
    "runtime.launch": (*LEAVES, "runtime.launch"),
    "runtime.scheduler": (*LEAVES, "runtime.scheduler", "runtime.launch.child"),
    "runtime.output": (*LEAVES, "runtime.output", "runtime.launch.child"),
    "runtime.worker": (*LEAVES, "runtime.worker", "runtime.models.registry", "runtime.pipelines", "runtime.parallel"),
    "runtime.pipelines": ("configs", "runtime.errors", "runtime.messages", "runtime.pipelines", "runtime.samplers"),
    "runtime.samplers": ("runtime.errors", "runtime.pipelines", "runtime.samplers"),
    "runtime.models": (*MODEL, "runtime.text", "runtime.inputs", "runtime.layers", "runtime.parallel", "kernels"),
    "transformer": ("runtime.errors", "runtime.layers", "runtime.parallel", "kernels", "runtime.models.loading"),
    "runtime.layers": ("runtime.errors", "runtime.layers", "runtime.parallel", "kernels"),
    "runtime.parallel": ("runtime.errors", "runtime.parallel", "kernels"),
    "kernels": ("kernels", "runtime.errors"),
}
LAZY = {
    "runtime.launch": ("runtime.scheduler.main", "runtime.output.main", "entrypoints.http.main", "runtime.worker"),
}
NO_TORCH = ("configs", "entrypoints", "runtime.launch", "runtime.scheduler", "runtime.output", "runtime.text")


def modules() -> Iterator[tuple[str, Path]]:
    for folder in ("configs", "entrypoints", "kernels", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


def owner(name: str, prefixes: object) -> str | None:
    found = [p for p in prefixes if name == p or name.startswith(p + ".")]  # type: ignore[attr-defined]
    return max(found, key=len, default=None)


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(absolute name, at the top of the module, line) of every import; a sub-module counts as its own name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.startswith("safelight.") and importlib.util.find_spec(str(node.module)) is not None
                part = ROOT.joinpath(*inner.split(".")[1:])
                named = is_module and (part.is_dir() or part.with_suffix(".py").is_file())
                yield inner if named else str(node.module), id(node) in top, node.lineno


def violations(name: str, path: Path) -> list[str]:
    is_transformer = name.startswith("runtime.models.") and name.endswith(".transformer")
    layer = "transformer" if is_transformer else owner(name, ALLOWED)
    if layer is None:
        return [f"{name} belongs to no layer of this test"]
    found = []
    for imported, at_top, line in imports(path):
        inner = imported.removeprefix("safelight.")
        if not imported.startswith("safelight."):
            continue
        allowed = ALLOWED[layer] + (() if at_top else LAZY.get(layer, ()))
        if owner(inner, allowed) is None:
            found.append(f"{name}:{line}: {layer} must not import {inner}")
    return found


def test_imports_point_one_way() -> None:
    found = [message for name, path in modules() for message in violations(name, path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("entrypoints.new", "from safelight.runtime.worker import main"),
        ("runtime.scheduler.new", "from safelight.runtime.output import main"),
        ("runtime.launch.new", "from safelight.runtime.output import main"),
        ("runtime.models.wan.transformer", "from safelight.runtime.pipelines.protocol import Pipeline"),
        ("runtime.layers.new", "import safelight.runtime.models.registry"),
        ("configs.new", "from safelight.runtime.messages import Event"),
        ("runtime.helpers", ""),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, name: str, line: str) -> None:
    path = tmp_path / "new.py"
    path.write_text(line + "\n")
    assert violations(name, path)


def test_torch_free_layers_do_not_name_torch() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for name, path in modules()
        if owner(name, NO_TORCH)
        for imported, _, line in imports(path)
        if imported.split(".")[0] in ("torch", "diffusers", "transformers")
    ]
    assert not found


@pytest.mark.parametrize(
    "module",
    [
        "entrypoints.cli",
        "entrypoints.client",
        "entrypoints.generate",
        "entrypoints.live",
        "entrypoints.doctor",
        "entrypoints.serve",
        "entrypoints.async_client",
        "entrypoints.http.main",
        "runtime.launch.supervisor",
        "runtime.scheduler.main",
        "runtime.output.main",
        "runtime.text.t5",
        "configs.families",
    ],
)
def test_processes_without_torch_stay_without_it(module: str) -> None:
    program = (
        f"import sys, safelight.{module}\nprint(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    )
    environ = {"PYTHONPATH": str(ROOT.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_linked_folders_have_no_init_of_their_own() -> None:
    for folder in ("configs", "entrypoints", "kernels", "runtime"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not list((Path(__file__).parents[1]).rglob("__init__.py"))
