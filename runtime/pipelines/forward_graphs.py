"""Forwards of a transformer as CUDA graphs: recorded once for each shape of the inputs, then launched as one.

A forward launches some two thousand kernels. Where the device is faster than Python (small pictures, tokens shared by
several GPUs), it waits between them; a graph takes the host's share away. Collectives are part of a graph.

The first forward of a shape runs as it is (kernels compile, libraries choose their algorithms), the second is recorded
and launched. A recording keeps the addresses of weights, inputs and activations: inputs are copied to where it reads
them, and the result is copied away. Recordings of one need of memory (texts of every length beside one picture) have
one pool for their activations, as only one runs at a time.

NCCL wants a collective to be recorded by all of its ranks or by none, so what is recorded depends on what ranks that
share a forward have in common: shapes, their order, the memory that a forward needs by its family's costs, and that
of the smallest device.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from safelight.runtime.errors import JobFailed

ROOM_BYTES = 4 << 30  # for the activations of all recordings
MOST_GRAPHS = 32  # each some megabytes of launches, which are not counted
MOST_SHAPES = 1024  # remembered as seen
IDLE_FORWARDS = 400  # a pool that was not used for so long gives way to another need
log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Records what a call launches. `rounding`: bytes that a pool may take beyond what its tensors need."""

    rounding: int

    def pool(self, size: int) -> Any:
        """A new pool of memory, which is going to hold about `size` bytes and lasts as long as its recordings."""
        ...

    def record(self, call: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
        """-> what launches it again, and the tensor into which that writes. The call's work is not done yet."""
        ...


@dataclass(frozen=True, slots=True)
class _Recording:
    size: int  # of its pool
    inputs: tuple[Tensor, ...]
    launch: Callable[[], None]
    output: Tensor
    forward: Callable[..., Tensor]  # kept, so that no other one gets its identity


@dataclass(slots=True)
class _Pool:
    """Memory of recordings that need the same; `used`: number of the forward that used it last."""

    memory: Any
    used: int


class ForwardGraphs:
    """Of one model, used by one thread. Without a recorder every forward runs as it is.

    `room`: bytes for activations of all recordings, which a worker sets aside; one forward may need half of it.
    `shared`: whether forwards have collectives in them.
    """

    def __init__(self, recorder: Recorder | None = None, room: int = ROOM_BYTES, *, shared: bool = False) -> None:
        self._recorder, self._shared = recorder, shared
        self.room = 0 if recorder is None else room
        self._seen: OrderedDict[Hashable, int] = OrderedDict()  # shapes, and what their forward needs
        self._made: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._pools: dict[int, _Pool] = {}  # by what a forward needs
        self._forwards = 0

    @property
    def count(self) -> int:
        """Recordings that are kept."""
        return len(self._made)

    def __call__(self, forward: Callable[..., Tensor], *inputs: Any, needs: Callable[[], int]) -> Tensor:
        """`forward(*inputs)`, inputs being tensors, None and tuples of them. `needs()`: bytes of its activations.

        The result is the caller's own. `forward` must launch the same work for the same shapes. Without memory to
        record it, it runs as it is; one with collectives raises JobFailed then.
        """
        if self._recorder is None:
            return forward(*inputs)
        self._forwards += 1
        recording = self._recording(self._recorder, forward, inputs, needs)
        if recording is None:
            return forward(*inputs)
        for place, tensor in zip(recording.inputs, _tensors(inputs), strict=True):
            place.copy_(tensor)
        recording.launch()
        return recording.output.clone()

    def clear(self) -> None:
        """Forgets all recordings. Call it before communicators are destroyed that they use."""
        self._made.clear()
        self._pools.clear()
        self._seen.clear()

    def switch_off(self) -> None:
        """Records nothing from here on, and needs no room."""
        self.clear()
        self._recorder, self.room = None, 0

    def _recording(
        self, recorder: Recorder, forward: Callable[..., Tensor], inputs: Any, needs: Callable[[], int]
    ) -> _Recording | None:
        """Of a forward whose shape was seen before; None when it was not, or there is no room."""
        key = (id(forward), _shape(inputs))
        size = self._seen.get(key)
        if size is None:
            self._seen[key] = needs() + recorder.rounding
            while len(self._seen) > MOST_SHAPES:
                self._seen.popitem(last=False)
            return None
        self._seen.move_to_end(key)
        pool = self._pools.get(size)
        if pool is None:
            if not self._make_room(size):
                return None
            pool = self._pools[size] = _Pool(recorder.pool(size), self._forwards)
        pool.used = self._forwards
        if key not in self._made:
            made = self._record(recorder, pool, size, forward, inputs)
            if made is None:
                return None
            self._made[key] = made
        self._made.move_to_end(key)
        while len(self._made) > MOST_GRAPHS:
            self._made.popitem(last=False)
        return self._made[key]

    def _make_room(self, size: int) -> bool:
        """Whether another pool of this size fits, idle ones having made way."""
        if size > self.room // 2:
            return False
        for other, pool in sorted(self._pools.items(), key=lambda item: item[1].used):
            if sum(self._pools) + size > self.room and self._forwards - pool.used > IDLE_FORWARDS:
                del self._pools[other]
                for key in [key for key, made in self._made.items() if made.size == other]:
                    del self._made[key]
        return sum(self._pools) + size <= self.room

    def _record(
        self, recorder: Recorder, pool: _Pool, size: int, forward: Callable[..., Tensor], inputs: Any
    ) -> _Recording | None:
        places = _mapped(inputs, lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device))
        try:
            launch, output = recorder.record(lambda: forward(*places), pool.memory)
        except torch.OutOfMemoryError as error:  # any other error, and capturing may be broken for good
            if self._shared:  # the other ranks may have recorded it
                raise JobFailed(f"no memory to record a forward: {error}; use --no-cuda-graphs") from error
            log.warning("no CUDA graphs from here on, there is no memory to record a forward: %s", error)
            self.switch_off()
            return None
        return _Recording(size, tuple(_tensors(places)), launch, output, forward)


class CudaRecorder:
    """torch.cuda.CUDAGraph, without the synchronisation and the emptying of caches of `torch.cuda.graph`."""

    rounding = 22 << 20  # the allocator puts tensors of 1 to 10 MiB into pieces of 20, smaller ones into pieces of 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pool(self, size: int) -> Any:
        if torch.cuda.mem_get_info(self._device)[0] < size:
            torch.cuda.empty_cache()  # the allocator does not give cached memory back while a stream records
        return torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), _no_collection():
            # thread_local: other threads ask for events meanwhile (NCCL's watchdog, the completer)
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                output = call()
            finally:
                graph.capture_end()
        return graph.replay, output


@contextmanager
def _no_collection() -> Iterator[None]:
    """The collector may free what must not be freed while a stream records (another graph)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def forward_graphs(device: torch.device, memory: int | None = None, *, shared: bool = False) -> ForwardGraphs:
    """Of a CUDA device, with at most a sixteenth of `memory` for activations; elsewhere they do nothing.

    `memory`: of the smallest device among ranks that share forwards; None: this one's.
    """
    if device.type != "cuda":
        return ForwardGraphs()
    total = torch.cuda.get_device_properties(device).total_memory if memory is None else memory
    return ForwardGraphs(CudaRecorder(device), min(ROOM_BYTES, total // 16), shared=shared)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from _tensors(part)


def _shape(value: Any) -> Hashable:
    """What two inputs have in common that one recording serves."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    return None if value is None else (type(value), *map(_shape, value))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if value is None:
        return None
    parts = [_mapped(part, change) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
