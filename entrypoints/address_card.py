"""How Python clients on this host find a running server: a file in its state folder."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from safelight.configs.families import ModelSpec, identify
from safelight.runtime.errors import ConfigError
from safelight.runtime.inputs import InputStore
from safelight.runtime.launch.folders import INPUTS
from safelight.runtime.messages import Endpoints

NAME = "server.json"


class Card(msgspec.Struct, frozen=True):
    """`model`: the directory of the served model, and how it is run."""

    endpoints: Endpoints
    model: str
    backend: str
    trust_remote_code: bool
    vae_path: str | None = None  # of another VAE than the model's

    @property
    def spec(self) -> ModelSpec:
        """What is served. Nothing of the model's is executed here. Raises ModelError."""
        return identify(Path(self.model), self.backend, self.trust_remote_code)


def write(folder: Path, card: Card) -> Path:
    """Whole or not at all, for its owner's eyes only. Returns the file."""
    path = folder / NAME
    partial = folder / f".{NAME}.{os.getpid()}"
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(msgspec.json.encode(card))
    partial.rename(path)
    return path


def read(endpoint: str | Path) -> tuple[Card, InputStore]:
    """The card, and the folder of the server's input pictures.

    `endpoint` is the state folder of a server, or the file in it. Raises ConfigError.
    """
    path = Path(endpoint).expanduser()
    path = path / NAME if path.is_dir() else path
    try:
        card = msgspec.json.decode(path.read_bytes(), type=Card)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"the state folder of a running `safelight serve` expected at {endpoint}: {error}", param="endpoint"
        ) from error
    return card, InputStore(path.parent / INPUTS)
