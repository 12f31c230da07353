"""`--model-path`, found for a command: which backend takes a model is known before its weights are fetched."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path

from safelight.configs.families import FAMILIES, foresee
from safelight.configs.server_args import ServerArgs
from safelight.runtime import hub
from safelight.runtime.errors import ModelError


def find_root(args: ServerArgs, tell: Callable[[str], None], *, quiet: bool = False) -> Path:
    """The model directory that the arguments name, downloaded if it is a Hugging Face id.

    Of a repository model_index.json is read first: `tell` is told which backend takes it, and a model that none does
    is refused before its weights are fetched. Raises ModelError; for a name that looks like a known model's with that.
    """

    def inspect(index: Path) -> None:
        tell(f"{args.model_path}: {foresee(index, args.backend, args.trust_remote_code)}")

    try:
        return hub.resolve(args.model_path, quiet=quiet, code=args.trust_remote_code, inspect=inspect)
    except ModelError as error:
        raise type(error)(error.message + suggestion(args.model_path or ""), param=error.param) from error


def with_local_vae(args: ServerArgs, *, quiet: bool = False) -> ServerArgs:
    """The arguments with --vae-path as a directory, downloaded if it is a Hugging Face id. Raises ModelError."""
    if args.vae_path is None:
        return args
    return dataclasses.replace(args, vae_path=str(hub.resolve(args.vae_path, "vae_path", quiet=quiet)))


def suggestion(text: str) -> str:
    """`; did you mean 'organisation/name'?` when `text` is nearly the name or the hub id of a model that is known."""
    ids = {v.hub_id: v.name for family in FAMILIES.values() for v in family.variants if v.hub_id}
    names = {name.lower(): hub_id for hub_id, name in ids.items()} | {hub_id.lower(): hub_id for hub_id in ids}
    near = difflib.get_close_matches(Path(text).name.lower(), names, n=1, cutoff=0.7)
    near = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.8) or near
    return f"; did you mean {names[near[0]]!r}?" if near and names[near[0]] != text else ""
