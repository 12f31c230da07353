"""The environment variables that Safelight reads; the command line and config files win over them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from safelight.configs.options import did_you_mean
from safelight.runtime.errors import ConfigError

# SGLang Diffusion's names are read where they mean the same; ours win.
FIELD_OF_VARIABLE = MappingProxyType(
    {
        "SGLANG_DIFFUSION_TARGET_DEVICE": "device",
        "SGLANG_DIFFUSION_LOGGING_LEVEL": "log_level",
        "SAFELIGHT_DEVICE": "device",
        "SAFELIGHT_LOG_LEVEL": "log_level",
        "SAFELIGHT_MODEL_PATH": "model_path",
        "SAFELIGHT_OUTPUT_PATH": "output_path",
        "SAFELIGHT_STATE_DIR": "state_dir",
    }
)


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
