"""The command line in processes of its own: what people and scripts see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import safelight
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.http_args import HttpArgs
from safelight.configs.options import flag
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.server_args import ServerArgs
from safelight.configs.worker_args import WorkerArgs

SOURCE = str(Path(next(iter(safelight.__path__))).parent)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SAFELIGHT_", "SGLANG_"))}
    environ |= {"PYTHONPATH": SOURCE, "COLUMNS": "200", "NO_COLOR": "1", **variables}
    command = [sys.executable, "-m", "safelight", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)


def test_help_names_the_commands_and_imports_nothing_slow() -> None:
    done = run("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("generate", "models", "doctor", "--version"))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "safelight.entrypoints.cli" in imported
    assert not imported & {"torch", "zmq", "msgspec", "numpy", "huggingface_hub", "yaml", "diffusers"}


def test_every_option_is_a_flag_of_serve() -> None:
    shown = run("serve", "--help").stdout
    for config in (HttpArgs, ServerArgs):
        for field in fields(config):
            assert (f"{flag(field.name)} " in shown) is not field.metadata["file_only"], field.name


def test_version_is_the_packages() -> None:
    assert run("--version").stdout == f"safelight {safelight.__version__}\n"


def test_every_option_is_a_flag_of_generate() -> None:
    shown = run("generate", "--help").stdout
    for config in (SamplingParams, GenerateArgs, ServerArgs):
        for field in fields(config):
            assert (f"{flag(field.name)} " in shown) is not field.metadata["file_only"], field.name
    assert "--no-save-output" in shown
    assert "--config" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate"], 2, "one of --prompt and --prompt-path expected, got neither"),
        (["generate", "--prompt", "a", "--prompt-path", "b"], 2, "got both"),
        (["generate", "--prompt", "a", "--policy", "fiar"], 2, "did you mean 'fair'"),
        (["generate", "--prompt", "a", "--model-path", "/no/such"], 1, "model directory expected at /no/such"),
        (["generate", "--prompt", "a", "--num_gpus", "3", "--replicas", "2"], 2, "does not divide"),
        (["generate", "--prompt", "a", "--config", "/none.yaml"], 2, "cannot be read"),
        (["generate", "--prompt-path", "/none.txt"], 2, "--prompt-path: /none.txt cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_on_stderr(arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["generate", "--height", "tall"], ["generate", "--heigth", "3"], ["paint"], ["generate", "--seed"]]
)
def test_unusable_command_lines_exit_with_2_and_no_traceback(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_machine_gets_the_error_as_json_too() -> None:
    done = run("generate", "--json", "--prompt", "a", "--model-path", "/no/such")
    assert json.loads(done.stdout) == {
        "event": "error",
        "code": "model_error",
        "message": "model directory expected at /no/such, none is there; check --model-path",
        "param": "model_path",
    }
    assert done.returncode == 1


def test_the_command_line_wins_over_config_and_environment(tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    config.write_text('{"model_path": "/from/config"}')
    base = ["generate", "--prompt", "a"]
    environ = {"SAFELIGHT_MODEL_PATH": "/from/environment"}
    assert "/from/environment" in run(*base, **environ).stderr
    assert "/from/config" in run(*base, "--config", str(config), **environ).stderr
    assert "/from/flag" in run(*base, "--config", str(config), "--model-path", "/from/flag", **environ).stderr


def test_keys_are_made_once(tmp_path: Path) -> None:
    made = run("keys", str(tmp_path / "keys"))
    assert made.returncode == 0
    assert str(tmp_path / "keys" / "server.key_secret") in made.stdout.splitlines()
    again = run("keys", str(tmp_path / "keys"))
    assert (again.returncode, again.stdout) == (2, "")
    assert "already" in again.stderr


def test_models_lists_every_variant() -> None:
    from safelight.configs.families import FAMILIES

    listed = json.loads(run("models", "--json").stdout)["models"]
    names = [variant.name for family in FAMILIES.values() for variant in family.variants]
    assert [entry["variant"] for entry in listed] == names
    table = run("models").stdout
    assert all(name in table for name in names)


def test_doctor_reports_without_importing_torch_itself() -> None:
    done = run("doctor", "--json", PYTHONPROFILEIMPORTTIME="1")
    report = json.loads(done.stdout)
    states = {finding["name"]: finding["state"] for finding in report["findings"]}
    assert states["python"] == "ok"
    assert states["torch"] == "ok"
    assert {"devices", "triton", "flash-attn", "yunchang", "cache-dit", "shared memory", "H.264"} <= set(states)
    assert report["ok"]
    assert done.returncode == 0
    # The import profile of doctor itself; those of the Pythons that it asks are captured by it.
    assert not any(line.rpartition("|")[2].strip() == "torch" for line in done.stderr.splitlines())


def test_the_documentation_lists_every_option_with_its_help() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    shared = {field.name for field in fields(ServerArgs)}
    for config in (SamplingParams, GenerateArgs, ServerArgs, HttpArgs, WorkerArgs):
        for field in fields(config):
            if config is WorkerArgs and field.name in shared:
                continue
            name = field.name if field.metadata["file_only"] else flag(field.name)
            (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
            assert row.endswith(f"| {field.metadata['help']} |")
            assert all(choice in row for choice in field.metadata["choices"])
