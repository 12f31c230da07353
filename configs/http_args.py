"""What `safelight serve` adds to the server's arguments: where it listens, who may talk to it, what it refuses."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from safelight.configs.options import check_options, option
from safelight.runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HttpArgs:
    """Raises ConfigError naming the flag when a value is of the wrong type or out of range."""

    host: str = option("127.0.0.1", "address to listen on; another than the loopback one needs an API key")
    port: int = option(30000, "TCP port; 0: a free one", minimum=0)
    api_key_file: str | None = option(
        None, "file with one API key a line, or OWNER:KEY; each owner has jobs of its own (or SAFELIGHT_API_KEY)"
    )
    max_pixels: int | None = option(
        None, "pixels of a picture or frame; unset: 1048576, or twice the model's default if that is more", minimum=1
    )
    max_frames: int = option(1000, "frames of a video", minimum=1)
    max_steps: int = option(500, "denoising steps of a request", minimum=1)
    max_outputs: int = option(10, "pictures of a request (n)", minimum=1)
    max_body_mb: float = option(16.0, "megabytes of a request", minimum=0.001)
    max_input_mb: float = option(64.0, "megabytes of a request that may bring pictures", minimum=0.001)
    allow_url_inputs: bool = option(
        False, "fetch pictures from http and https addresses of the public internet that requests name"
    )

    def __post_init__(self) -> None:
        check_options(self, ConfigError)
        if self.port > 65535:
            raise ConfigError(f"--port: at most 65535 expected, got {self.port}", param="port")
        if not self.host.strip():
            raise ConfigError("--host: an address or a host name expected, got nothing", param="host")

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
