"""The `safelight` command. Commands import what they need when they run, so that `--help` is immediate."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import safelight
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.http_args import HttpArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.flags import merged, with_flags
from safelight.runtime.errors import Cancelled, ConfigError, InvalidRequest, ModelError, SafelightError

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
CONTEXT: dict[str, Any] = {
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}

app = typer.Typer(
    name="safelight",
    help="Serves image and video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, for machines")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"safelight {safelight.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Serves image and video diffusion transformers."""


@app.command()
@with_flags({"What to make": SamplingParams, "Files": GenerateArgs, "Model and processes": ServerArgs})
def generate(
    config: Annotated[
        Path | None, typer.Option("--config", help="JSON or YAML file of these flags; the command line wins")
    ] = None,
    **given: Any,
) -> None:
    """Makes pictures and videos, and exits; the path of the result is printed last."""
    from safelight.entrypoints.generate import run

    sampling, files, server = merged(given, config, (SamplingParams, GenerateArgs, ServerArgs))
    raise typer.Exit(run(SamplingParams(**sampling), GenerateArgs(**files), ServerArgs(**server)))


@app.command()
@with_flags({"Service": HttpArgs, "Model and processes": ServerArgs})
def serve(
    config: Annotated[
        Path | None, typer.Option("--config", help="JSON or YAML file of these flags; the command line wins")
    ] = None,
    **given: Any,
) -> None:
    """Keeps a model loaded and answers OpenAI's Images and Videos API."""
    from safelight.entrypoints.serve import run

    http, server = merged(given, config, (HttpArgs, ServerArgs))
    raise typer.Exit(run(HttpArgs(**http), ServerArgs(**server)))


@app.command()
def models(json: Json = False) -> None:
    """Lists the supported models, with their defaults."""
    from safelight.entrypoints.models import show

    show(json)


@app.command()
def doctor(
    plan: Annotated[
        str | None,
        typer.Option("--plan", help="only: the layout that a model (directory or name) would get", show_default=False),
    ] = None,
    num_gpus: Annotated[int, typer.Option("--num-gpus", help="workers to plan for", min=1)] = 1,
    json: Json = False,
) -> None:
    """Says what this machine has, what is missing, and what that would enable."""
    if plan is not None:
        from safelight.entrypoints.plan import show

        show(plan, num_gpus, json)
        return
    from safelight.entrypoints.doctor import examine

    raise typer.Exit(examine(json))


@app.command()
def keys(folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new folder for them")]) -> None:
    """Makes the key files by which hosts that talk over tcp know each other."""
    from safelight.runtime.curve import make_keys

    for path in make_keys(folder):
        print(path)


def command_names() -> list[str]:
    """The commands of this command line."""
    return list(typer.main.get_group(app).commands)


def exit_code(error: SafelightError) -> int:
    """2 for what the caller wrote wrong, 130 for a cancelled run, 1 for everything else."""
    if isinstance(error, Cancelled):
        return INTERRUPTED
    usage = isinstance(error, InvalidRequest | ConfigError) and not isinstance(error, ModelError)
    return USAGE if usage else FAILURE


def main() -> None:
    """Runs the command line; errors of ours are one line on stderr and an exit code, never a traceback."""
    guarded(app)


def guarded(run: Callable[[], Any]) -> None:
    """Runs it as `main` runs the command line."""
    try:
        run()
    except SafelightError as error:
        if "--json" in sys.argv:
            failure = {"event": "error", "code": error.code, "message": error.message, "param": error.param}
            print(json_module.dumps(failure, ensure_ascii=False), flush=True)
        print(f"safelight: {error.message}", file=sys.stderr)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
