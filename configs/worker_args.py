"""The arguments of a rank that torchrun starts for a server elsewhere; how the model runs is the server's to say."""

from __future__ import annotations

from dataclasses import dataclass

from safelight.configs.network import check_endpoint
from safelight.configs.options import check_options, option
from safelight.runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WorkerArgs:
    """Raises ConfigError naming the flag when a value is of the wrong type or contradicts another."""

    scheduler: str | None = option(None, "tcp://HOST:PORT, the --worker-endpoint of the server")
    keys: str | None = option(None, "folder of key files made by `safelight keys`")
    interface: str | None = option(None, "network interface of NCCL and gloo; unset: the server's, or they choose")
    device: str = option("auto", "where the model runs", choices=("auto", "cuda", "cpu"))
    join_timeout_s: float = option(300.0, "seconds without any answer of the server until a rank gives up", minimum=1)
    log_level: str = option("warning", "of this rank", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        check_options(self, ConfigError)
        if self.scheduler is None:
            raise ConfigError("--scheduler: tcp://HOST:PORT of a running server expected", param="scheduler")
        check_endpoint("scheduler", self.scheduler, self.keys)

    @property
    def endpoint(self) -> str:
        assert self.scheduler is not None, "checked"
        return self.scheduler
