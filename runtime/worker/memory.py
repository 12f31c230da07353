"""What a rank's device can hold, as reported in Ready."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

CUDA_RESERVE_BYTES = 2 << 30  # context, communicators, fragmentation
CPU_RESERVE_BYTES = 1 << 29


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes: `capacity` is what this rank may use in all, weights included; `reserve` is never planned with."""

    capacity: int
    reserve: int
    name: str


def device_memory(device: torch.device, ranks_on_host: int, weights_bytes: int) -> DeviceMemory:
    """Capacity of the rank's device: all free memory of its GPU, or its share of the host's free memory."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_reserved(device)
        return DeviceMemory(free + used, CUDA_RESERVE_BYTES, torch.cuda.get_device_name(device))
    share = _available_host_bytes() // max(1, ranks_on_host)
    return DeviceMemory(share + weights_bytes, CPU_RESERVE_BYTES, "cpu")


def peak_bytes(device: torch.device, weights_bytes: int) -> int:
    """Most bytes allocated beyond the weights since the last call; 0 where the platform does not measure it."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return max(0, peak - weights_bytes)


def _available_host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 33
