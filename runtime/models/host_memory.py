"""Weights in host memory: one allocation of exactly the bytes needed, page-locked if asked.

A copy from page-locked memory runs beside the host and at the full speed of the bus. torch's own allocator of such
memory rounds every allocation up to a power of two, which for a model is tens of gigabytes: here pages of our own are
registered with CUDA instead. The storage begins with the first of them: there torch looks whether a tensor is locked.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safelight.runtime.errors import ConfigError

_ALIGNMENT = 256  # bytes; what kernels assume of a tensor's address is less
_PAGE = 4096


class HostMemory:
    """`bytes`: (N,) uint8 on the CPU. It stays page-locked as long as this object lives."""

    def __init__(self, nbytes: int) -> None:
        self._pages = -(-nbytes // _PAGE)  # nothing else is on them: a page is locked once
        mapped = mmap.mmap(-1, max(1, self._pages) * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with torch.inference_mode(False):
            self.bytes = torch.frombuffer(mapped, dtype=torch.uint8)[:nbytes]

    def page_lock(self, device: torch.device) -> None:
        """Call it once, after the memory was filled; `device` is the one that reads it. Raises ConfigError when the
        host refuses."""
        if not self._pages:
            return
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = self.bytes.data_ptr()
        code = int(runtime.cudaHostRegister(address, self._pages * _PAGE, 0))
        if code != 0:
            raise ConfigError(
                f"--pin-cpu-memory: the host does not lock {self.bytes.numel() / 1e9:.1f} GB of memory (CUDA error "
                f"{code}); use --no-pin-cpu-memory, which is slower, or offload less",
                param="pin_cpu_memory",
            )
        weakref.finalize(self, _unlock, runtime, address, device)


def _unlock(runtime: Any, address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may be under way
    runtime.cudaHostUnregister(address)


def layout(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins when they are packed in order, and the bytes of all."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def tensor_at(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """A contiguous tensor of the shape and dtype of `like` in `memory`, (N,) uint8, from byte `offset` on."""
    nbytes = like.numel() * like.element_size()
    return memory[offset : offset + nbytes].view(like.dtype).view(like.shape)


def replace_parameters(module: nn.Module, home_of: Callable[[Tensor], Tensor]) -> list[nn.Parameter]:
    """Replaces every parameter p, under all of its names, by one whose data is home_of(p); they are asked for in the
    order of `module.parameters()`, and each p is freed before the next one. Returns the new ones.

    New objects, because what was made in inference mode cannot change its data later.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((child, name))
    made = []
    for names in places.values():
        made.append(nn.Parameter(home_of(getattr(*names[0])), requires_grad=False))
        for child, name in names:
            setattr(child, name, made[-1])
    return made
