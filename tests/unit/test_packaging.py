"""The wheel holds everything; scripts/run makes its environment once, and again when it must."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("configs", "entrypoints", "kernels", "runtime")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked; built from a copy, so that the repository stays clean."""
    try:
        metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        pytest.skip("setuptools is not installed here")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "-w", str(folder), str(copy)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("safelight-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_every_source_and_model_file(wheel: Path) -> None:
    suffixes = {".py", ".json", ".safetensors", ".md"}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in LINKED
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }
    packed = {path.relative_to(wheel / "safelight").as_posix() for path in (wheel / "safelight").rglob("*")}
    assert expected <= packed
    assert {"runtime/messages.py", "configs/families/wan.py", "entrypoints/cli.py", "kernels/dispatch.py"} <= packed
    assert {"runtime/models/builtin_model/model_index.json", "py.typed"} <= packed


def test_the_wheel_runs_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    program = "from safelight.runtime import hub; print(hub.builtin_model())"
    environ = {"PYTHONPATH": str(wheel), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, cwd=tmp_path)
    assert done.stdout.strip() == str(wheel / "safelight/runtime/models/builtin_model"), done.stderr
    command = [sys.executable, "-m", "safelight", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path)
    assert done.stdout.startswith("safelight "), done.stderr


# A Python that only pretends to make environments and to install, and notes each call.
FAKE_PYTHON = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
    "-m venv --clear "*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    "-m pip install "*)
        [[ -n ${FAIL:-} ]] && exit 1
        sleep 0.2
        printf '#!/bin/bash\\npwd -P; printf "%%s\\\\n" "$@"\\n' >"$(dirname "$0")/safelight"
        chmod +x "$(dirname "$0")/safelight" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "the clone"
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("train_*", "__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3.11").write_text(FAKE_PYTHON)
    (tmp_path / "bin" / "python3.11").chmod(0o755)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(folder / "scripts" / "run")
    return folder


@pytest.fixture
def start(clone: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts scripts/run through a symlink, from another working directory."""

    def call(*arguments: str, script: str = "./link", **variables: str) -> subprocess.Popen[str]:
        environ = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), **variables}
        pipe = subprocess.PIPE
        command = [script, *arguments]
        return subprocess.Popen(command, env=environ, cwd=tmp_path / "elsewhere", stdout=pipe, stderr=pipe, text=True)

    return call


def installs(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return [line for line in path.read_text().splitlines() if "pip install" in line] if path.exists() else []


def test_the_first_start_installs_and_later_ones_do_not(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    out, err = start("generate", "--prompt", "a b").communicate(timeout=30)
    assert out.splitlines() == [str(tmp_path / "elsewhere"), "generate", "--prompt", "a b"]
    assert "making" in err
    assert "installing" in err
    assert "-c constraints.txt -e ." in installs(tmp_path)[0]
    out, err = start("models").communicate(timeout=30)
    assert out.splitlines()[1:] == ["models"]
    assert err == ""
    assert len(installs(tmp_path)) == 1


def test_two_starts_at_once_install_once(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    both = [start("models"), start("models")]
    assert [process.communicate(timeout=30)[0].splitlines()[1:] for process in both] == [["models"], ["models"]]
    assert len(installs(tmp_path)) == 1


def test_a_failed_installation_is_done_again(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    failing = start("models", FAIL="1")
    out, err = failing.communicate(timeout=30)
    assert failing.returncode == 1
    assert out == ""
    assert "run this again to retry" in err
    assert start("models").communicate(timeout=30)[0].splitlines()[1:] == ["models"]


def test_changed_requirements_and_a_moved_clone_install_again(
    start: Callable[..., subprocess.Popen[str]], clone: Path, tmp_path: Path
) -> None:
    start("models").communicate(timeout=30)
    with (clone / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    start("models").communicate(timeout=30)
    assert len(installs(tmp_path)) == 2
    moved = clone.rename(tmp_path / "moved")
    assert start("models", script=str(moved / "scripts" / "run")).communicate(timeout=30)[0]
    assert len(installs(tmp_path)) == 3
    calls = (tmp_path / "calls").read_text()
    assert calls.count("-m venv --clear") == 2


def test_an_environment_for_tests_also_runs(
    start: Callable[..., subprocess.Popen[str]], clone: Path, tmp_path: Path
) -> None:
    start("-k", "x", script=str(clone / "scripts" / "test")).communicate(timeout=30)
    assert "-e .[dev]" in installs(tmp_path)[0]
    wanted = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -k x"
    assert (tmp_path / "calls").read_text().splitlines()[-1] == wanted
    start("models").communicate(timeout=30)
    assert len(installs(tmp_path)) == 1


def test_without_a_python_it_says_what_to_install(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "bin" / "python3.11").unlink()
    tools = ("bash", "sh", "dirname", "readlink", "cat", "sha256sum", "cut", "flock", "rm", "env")
    for name in tools:
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    process = start("models", PATH=str(tmp_path / "bin"))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Python 3.11 or newer" in err


def test_every_runtime_dependency_has_a_tested_version() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {requirement.split(">")[0].lower().replace("_", "-") for requirement in wanted}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names <= pinned
