"""Forwards of a transformer as CUDA graphs: recorded once for each shape of the inputs, then launched as one.

A forward launches some two thousand kernels. Where the device is faster than Python (small pictures, tokens shared by
several GPUs), it waits between them; a graph takes the host's share away. Collectives are part of a graph.

The first forward of a shape runs as it is (kernels compile, libraries choose their algorithms), the second is recorded
and launched. A recording keeps the addresses of weights, inputs and activations: inputs are copied to where it reads
them, the result is copied away, and all recordings share one pool of memory, as only one runs at a time. What to record
is decided by shapes and order alone, so that ranks that share a forward decide alike.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MOST_GRAPHS = 32  # recordings kept, each some megabytes of launches
MOST_SHAPES = 1024  # remembered as seen
MOST_BYTES = 2 << 30  # of activations: above it the device is slower than Python by far
log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Records what a call launches."""

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """-> what launches it again, and the tensor into which that writes. The call's work is not done yet."""
        ...


@dataclass(frozen=True, slots=True)
class _Recording:
    inputs: tuple[Tensor, ...]
    launch: Callable[[], None]
    output: Tensor
    forward: Callable[..., Tensor]  # kept, so that no other one gets its identity


class ForwardGraphs:
    """Of one model, used by one thread. Without a recorder every forward runs as it is.

    `room`: bytes of activations up to which forwards are recorded; a worker sets them aside.
    """

    def __init__(self, recorder: Recorder | None = None, room: int = MOST_BYTES) -> None:
        self._recorder = recorder
        self.room = 0 if recorder is None else room
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._made: OrderedDict[Hashable, _Recording] = OrderedDict()

    @property
    def count(self) -> int:
        """Recordings that are kept."""
        return len(self._made)

    def __call__(self, forward: Callable[..., Tensor], *inputs: Any, needs: Callable[[], int]) -> Tensor:
        """`forward(*inputs)`, inputs being tensors, None and tuples of them. `needs()`: bytes of its activations.

        The result is the caller's own. `forward` must launch the same work for the same shapes.
        """
        if self._recorder is None:
            return forward(*inputs)
        key = (id(forward), _shape(inputs))
        recording = self._made.get(key)
        if recording is None and needs() <= self.room:
            recording = self._made_now(self._recorder, key, forward, inputs)
        if recording is None:
            return forward(*inputs)
        self._made.move_to_end(key)
        for place, tensor in zip(recording.inputs, _tensors(inputs), strict=True):
            place.copy_(tensor)
        recording.launch()
        return recording.output.clone()

    def clear(self) -> None:
        """Forgets all recordings. Call it before communicators are destroyed that they use."""
        self._made.clear()
        self._seen.clear()

    def _made_now(
        self, recorder: Recorder, key: Hashable, forward: Callable[..., Tensor], inputs: Any
    ) -> _Recording | None:
        """The recording of a forward that was seen before; None when it was not, or cannot be recorded."""
        if key not in self._seen:
            self._seen[key] = None
            while len(self._seen) > MOST_SHAPES:
                self._seen.popitem(last=False)
            return None
        while len(self._made) >= MOST_GRAPHS:
            self._made.popitem(last=False)
        places = _mapped(inputs, lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device))
        try:
            launch, output = recorder.record(lambda: forward(*places))
        except torch.AcceleratorError:
            raise  # the device takes no more work
        except RuntimeError as error:
            log.warning("no CUDA graphs from here on, a forward cannot be recorded: %s", error)
            self.clear()
            self._recorder, self.room = None, 0
            return None
        self._made[key] = _Recording(tuple(_tensors(places)), launch, output, forward)
        return self._made[key]


class CudaRecorder:
    """torch.cuda.CUDAGraph, without the synchronisation and the emptying of caches of `torch.cuda.graph`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), _no_collection():
            # thread_local: other threads ask for events meanwhile (NCCL's watchdog, the completer)
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = call()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
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


def forward_graphs(device: torch.device) -> ForwardGraphs:
    """Of a CUDA device, with at most a twentieth of its memory for activations; elsewhere they do nothing."""
    if device.type != "cuda":
        return ForwardGraphs()
    total = torch.cuda.get_device_properties(device).total_memory
    return ForwardGraphs(CudaRecorder(device), min(MOST_BYTES, total // 20))


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
