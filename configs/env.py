"""The environment variables that Safelight reads; the command line and config files win over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from safelight.configs.network import check_interface
from safelight.configs.options import did_you_mean
from safelight.runtime.errors import ConfigError

# SGLang Diffusion's names are read where they mean the same; ours win.
FIELD_OF_VARIABLE = MappingProxyType(
    {
        "SGLANG_DIFFUSION_TARGET_DEVICE": "device",
        "SGLANG_DIFFUSION_LOGGING_LEVEL": "log_level",
        "SAFELIGHT_API_KEY": "api_key",
        "SAFELIGHT_DEVICE": "device",
        "SAFELIGHT_INTERFACE": "interface",
        "SAFELIGHT_KEYS": "keys",
        "SAFELIGHT_LOG_LEVEL": "log_level",
        "SAFELIGHT_MODEL_PATH": "model_path",
        "SAFELIGHT_OUTPUT_PATH": "output_path",
        "SAFELIGHT_STATE_DIR": "state_dir",
    }
)

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True, slots=True)
class TorchrunRank:
    """What torchrun tells a process that it starts. Its restart count is of one agent, so it numbers nothing here."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    nodes: int
    run: str
    master_addr: str
    master_port: int


def torchrun_rank(environ: Mapping[str, str]) -> TorchrunRank:
    """Raises ConfigError when torchrun did not start this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_PORT")
    try:
        rank, world_size, local_rank, local_world_size, nodes, port = (int(environ[name]) for name in names)
        run, address = environ["TORCHELASTIC_RUN_ID"], environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"a worker is started by torchrun, which sets RANK and others ({error} is missing or no number); "
            "use `torchrun --nnodes N --nproc-per-node G ... -m safelight.entrypoints.worker`"
        ) from error
    return TorchrunRank(rank, world_size, local_rank, local_world_size, nodes, run, address, port)


def interface_variables(name: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that bind gloo and NCCL to a network interface; none without one.

    Raises ConfigError for an interface that is not there, or when the environment names another one.
    """
    if name is None:
        return {}
    check_interface(name)
    for variable in _INTERFACE_VARIABLES:
        if (found := environ.get(variable, name)) != name:
            raise ConfigError(f"--interface {name} contradicts {variable}={found}; unset one", param="interface")
    return dict.fromkeys(_INTERFACE_VARIABLES, name)


def api_key(environ: Mapping[str, str]) -> str | None:
    """The key that clients of `serve` must send: a secret, so there is no flag for it."""
    return environ.get("SAFELIGHT_API_KEY", "").strip() or None


def from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Option values by field name; an empty variable counts as unset.

    Raises ConfigError for an unknown SAFELIGHT_ variable: a setting is never ignored silently.
    """
    for name in environ:
        if name.startswith("SAFELIGHT_") and name not in FIELD_OF_VARIABLE:
            ours = [known for known in FIELD_OF_VARIABLE if known.startswith("SAFELIGHT_")]
            raise ConfigError(f"unknown environment variable {name}{did_you_mean(name, ours)}", param=name)
    found: dict[str, str] = {}
    for name, field in FIELD_OF_VARIABLE.items():
        value = environ.get(name, "").strip()
        if value:
            found[field] = value.lower() if field in ("device", "log_level") else value
    return found
