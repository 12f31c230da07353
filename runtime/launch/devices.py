"""Which devices this host has, found without importing torch."""

from __future__ import annotations

import ctypes
import os
from importlib import metadata
from pathlib import Path

from safelight.runtime.errors import ConfigError


def cuda_device_count() -> int:
    """Devices that the CUDA driver shows to this process (CUDA_VISIBLE_DEVICES is honoured); 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def resolve_device(requested: str, num_gpus: int) -> str:
    """`auto` becomes cuda where torch is a CUDA build and enough devices are there, cpu otherwise.

    Raises ConfigError when CUDA is asked for, or is the automatic choice, with too few devices.
    """
    if requested == "cpu":
        return "cpu"
    devices = 0 if "+cpu" in metadata.version("torch") else cuda_device_count()
    if devices == 0 and requested == "auto":
        return "cpu"
    if devices < num_gpus:
        hint = "use --device cpu" if devices == 0 else f"use --num-gpus {devices} or fewer"
        message = f"--num-gpus {num_gpus}: that many CUDA devices expected, found {devices}; {hint}"
        raise ConfigError(message, param="num_gpus")
    return "cuda"


def host_id() -> str:
    """The same in all processes that share this kernel, and so its shared memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))
