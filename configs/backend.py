"""Which server arguments go with which backend, and what --trust-remote-code may not be combined with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safelight.configs.families import FAMILIES, ModelSpec
from safelight.configs.families.calls import CallSignature
from safelight.configs.families.diffusers import OWNED, REQUESTED
from safelight.configs.http_args import HttpArgs
from safelight.configs.options import did_you_mean, flag
from safelight.configs.server_args import ServerArgs
from safelight.runtime.errors import ConfigError, ModelError

_OF_DIFFUSERS = {
    "vae_slicing": False, "diffusers_attention_backend": None, "diffusers_kwargs": None, "trust_remote_code": False,
}  # fmt: skip
_OF_NATIVE = {"vae_path": None, "attention_backend": "auto"}


def check_backend(args: ServerArgs, spec: ModelSpec) -> None:
    """Raises ConfigError for an argument that the model's backend ignores or cannot do, with what to do instead."""
    family = FAMILIES[spec.family]
    others, backend = (_OF_NATIVE, "diffusers") if spec.call is not None else (_OF_DIFFUSERS, "safelight")
    for name, unset in others.items():
        if getattr(args, name) != unset:
            raise ConfigError(
                f"{flag(name)} does nothing with the backend {backend}, which runs this model ({spec.reason}); "
                "leave it out, or choose another --backend",
                param=name,
            )
    if args.group_size > 1 and not family.capabilities.spans_ranks:
        raise ConfigError(
            f"--num-gpus {args.num_gpus} with --replicas {args.replicas}: a model of the backend {family.backend} runs "
            f"on one GPU; use --replicas {args.num_gpus} for one copy on each",
            param="num_gpus",
        )
    if args.checkpoint_every and not family.capabilities.resumes:
        raise ConfigError(
            f"--checkpoint-every {args.checkpoint_every}: jobs of the backend {family.backend} cannot resume in the "
            "middle (they start again when a worker dies); leave it out",
            param="checkpoint_every",
        )
    if spec.call is not None:
        _refuse_offloading(args)
        check_call(spec.call, args.diffusers_kwargs or {})


def _refuse_offloading(args: ServerArgs) -> None:
    """diffusers offloads by hooks which the end of every call takes off all components and puts on again, moving all
    weights to the CPU: also those that a call of another job, which waits between two steps, goes on with."""
    for name in args.offloaded:
        raise ConfigError(
            f"--{name.replace('_', '-')}-cpu-offload: a model of the backend diffusers stays on the GPU, because calls "
            "of several jobs take turns on it, and diffusers' offloading serves one call at a time; leave it out, or "
            "use a model of a native family",
            param=f"{name}_cpu_offload",
        )


def check_call(call: CallSignature, kwargs: Mapping[str, Any]) -> None:
    """Raises ConfigError for a further argument that the pipeline does not take or that is not `diffusers_kwargs`' to
    give, and ModelError when the pipeline needs one that nothing gives."""
    for name, value in kwargs.items():
        if name in REQUESTED or name in OWNED:
            owner = "each request" if name in REQUESTED else "Safelight"
            raise ConfigError(f"diffusers_kwargs: {name} is set by {owner}; leave it out", param="diffusers_kwargs")
        if name not in call:
            known = [n for n in (*call.required, *call.defaults) if n not in REQUESTED and n not in OWNED]
            raise ConfigError(
                f"diffusers_kwargs: {call.name} takes no {name!r}{did_you_mean(name, known)}", param="diffusers_kwargs"
            )
        if not _is_json(value):
            raise ConfigError(
                f"diffusers_kwargs: {name} must be made of numbers, text, true, false, null, lists and objects; got "
                f"{type(value).__name__}",
                param="diffusers_kwargs",
            )
    missing = [name for name in call.required if name not in REQUESTED and name not in OWNED and name not in kwargs]
    if missing:
        raise ModelError(
            f"{call.name} needs {', '.join(missing)}, which requests do not carry; give it as diffusers_kwargs in a "
            "config file if it is the same for all",
            param="model_path",
        )


def backend_settings(args: ServerArgs, spec: ModelSpec) -> dict[str, str]:
    """What of the backend changes the pictures: a run that goes on must have the same."""
    found = {"backend": FAMILIES[spec.family].backend}
    if spec.call is None:
        return found
    return found | {
        "vae_tiling": str(args.vae_tiling),
        "vae_slicing": str(args.vae_slicing),
        "diffusers_attention_backend": str(args.diffusers_attention_backend),
        "diffusers_kwargs": json.dumps(args.diffusers_kwargs or {}, sort_keys=True),
    }


def refuse_remote_code(args: ServerArgs, http: HttpArgs) -> None:
    """Raises ConfigError when a server that other machines can reach would run a checkpoint's own code."""
    if args.trust_remote_code and not http.is_loopback:
        raise ConfigError(
            f"--trust-remote-code with --host {http.host}: code of a checkpoint runs only in servers that no other "
            "machine can reach; use --host 127.0.0.1, or leave it out",
            param="trust_remote_code",
        )


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, bool | int | float | str)
