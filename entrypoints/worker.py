"""`torchrun ... -m safelight.entrypoints.worker`: a rank of a server elsewhere, or of a command beside rank 0.

torchrun ... -m safelight.entrypoints.worker --scheduler tcp://HOST:PORT --keys DIR [flags]
torchrun ... -m safelight.entrypoints.worker generate [flags of safelight generate]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.configs.env import TorchrunRank, torchrun_rank
from safelight.configs.network import address_towards, check_interface, free_ports, interface_address
from safelight.configs.server_args import ServerArgs
from safelight.configs.worker_args import WorkerArgs
from safelight.entrypoints import cli
from safelight.entrypoints.flags import merged, parsed, with_flags
from safelight.runtime import hub, logs
from safelight.runtime.errors import ConfigError
from safelight.runtime.launch import torchrun

COMMANDS = ("generate", "serve")
_PORTS = 3  # join, plans, chunks

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=cli.CONTEXT)


@app.command()
@with_flags({"Worker": WorkerArgs})
def join(
    config: Annotated[
        Path | None, typer.Option("--config", help="JSON or YAML file of these flags; the command line wins")
    ] = None,
    **given: Any,
) -> None:
    """Works as one rank, started by torchrun, for the server at --scheduler; or: COMMAND and its flags."""
    [values] = merged(given, config, (WorkerArgs,))
    args, place = WorkerArgs(**values), torchrun_rank(os.environ)
    _prepare(place, args.interface, args.log_level)
    torchrun.serve(args, place, hub.resolve)


def beside(command: str, argv: Sequence[str]) -> None:
    """Works as one rank of a command that rank 0 starts once. Raises SafelightError before anything is started."""
    place = torchrun_rank(os.environ)
    server = server_args(command, argv, place)
    _prepare(place, server.interface, server.log_level)

    def launch(folder: Path) -> tuple[str, list[str]]:
        endpoint = server.worker_endpoint or worker_endpoint(folder, server, place)
        added = ["--worker-endpoint", endpoint, "--num-gpus", str(place.world_size)]
        return endpoint, [command, *argv, *added]

    def worker_args(endpoint: str) -> WorkerArgs:
        return WorkerArgs(endpoint, server.keys, server.interface, server.device, log_level=server.log_level)

    torchrun.serve_command(launch, worker_args, place, hub.resolve)


def server_args(command: str, argv: Sequence[str], place: TorchrunRank) -> ServerArgs:
    """What the command's flags, file and environment say; --num-gpus is torchrun's world. Raises ConfigError."""
    found = next(values for kind, values in parsed(cli.app, command, argv) if kind is ServerArgs)
    if found.setdefault("num_gpus", place.world_size) != place.world_size:
        raise ConfigError(
            f"--num-gpus {found['num_gpus']} contradicts torchrun, which starts {place.world_size} ranks; leave it out",
            param="num_gpus",
        )
    if place.nodes > 1 and "keys" not in found:
        raise ConfigError(
            f"--keys: {place.nodes} nodes talk over tcp, which needs a folder of keys that all of them see; make it "
            "with `safelight keys DIR`",
            param="keys",
        )
    return ServerArgs(**found)


def _prepare(place: TorchrunRank, interface: str | None, log_level: str) -> None:
    logs.configure(f"rank {place.rank}", log_level)
    if interface is not None:
        check_interface(interface)


def worker_endpoint(folder: Path, server: ServerArgs, place: TorchrunRank) -> str:
    """ipc on one node; on several the private interface's address, or the one that faces the other nodes."""
    if place.nodes == 1:
        return f"ipc://{folder / 'join.ipc'}"
    if server.interface is not None:
        address = interface_address(server.interface)
    else:
        address = address_towards(place.master_addr, place.master_port)
    if address.startswith("127.") and not place.master_addr.startswith("127."):  # by name, not by wish
        raise ConfigError(
            f"{place.master_addr} is {address} here, which other nodes cannot reach; pass --interface NAME, or "
            "torchrun's --local-addr",
            param="interface",
        )
    return f"tcp://{address}:{free_ports(address, _PORTS)}"


def _main() -> None:
    argv = sys.argv[1:]
    if argv and argv[0] in COMMANDS and argv[0] in cli.command_names():
        beside(argv[0], argv[1:])
    else:
        app()


if __name__ == "__main__":
    cli.guarded(_main)
