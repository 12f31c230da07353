"""A transformer's blocks from host memory, one after the other: block i + 1 is copied in while block i computes.

Two buffers on the device take turns: the parameters of an even block are views of the first one for good, those of an
odd block of the second. So parameters keep their identity and address, which compiled blocks rely on, and only the
contents change. Copies run on a stream of their own. Two kinds of events order them against the computation, which is
on the caller's stream: a buffer is written only after the block that reads it, and read only after it was written. The
host never waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from safelight.runtime.models.host_memory import HostMemory, layout, replace_parameters, tensor_at


class CudaOrder:
    """Copies on a stream of their own, and the events between it and the caller's stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._written = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def adopt(self, buffer: Tensor) -> None:
        """Memory of a deleted buffer is not used again before the copies into it are done."""
        buffer.record_stream(self._stream)

    def mark(self) -> None:
        """Copies queued from now on start after everything that has been launched."""
        self._computed.record(torch.cuda.current_stream(self._device))

    @contextmanager
    def copying(self, place: int) -> Iterator[None]:
        """What is queued inside writes buffer `place`, after the last mark."""
        self._stream.wait_event(self._computed)
        with torch.cuda.stream(self._stream):
            yield
        self._written[place].record(self._stream)

    def use(self, place: int) -> None:
        """What is launched from now on starts after the copy into buffer `place` that was queued last."""
        torch.cuda.current_stream(self._device).wait_event(self._written[place])


class HostOrder:
    """Everything runs in the order in which it is called."""

    def adopt(self, buffer: Tensor) -> None: ...

    def mark(self) -> None: ...

    def copying(self, place: int) -> AbstractContextManager[None]:
        return nullcontext()

    def use(self, place: int) -> None: ...


class BlockStream:
    """The blocks of `lists`, in the order in which a forward pass calls them. Its forwards run on one CUDA stream.

    With an odd number of blocks the last one stays on the device: first and last would share a buffer otherwise, and
    the first could not be copied while the last computes. `order` keeps copies and computations apart; it is the
    device's unless given.
    """

    def __init__(
        self,
        lists: Sequence[nn.ModuleList],
        device: torch.device,
        *,
        pin: bool,
        order: CudaOrder | HostOrder | None = None,
    ) -> None:
        blocks = [block for each in lists for block in each]
        self.copies = 0  # blocks copied so far
        self._count = len(blocks) - len(blocks) % 2
        self._device = device
        self._open: int | None = None
        self._held: list[int | None] = [None, None]
        cuda = device.type == "cuda"
        self._order = order or (CudaOrder(device) if cuda else HostOrder())
        with torch.inference_mode(False):
            self._place(blocks, pin=pin and cuda)

    def _place(self, blocks: list[nn.Module], *, pin: bool) -> None:
        """Packs the streamed blocks into host memory, and makes their parameters views of the buffers."""
        ids = [id(p) for block in blocks for p in block.parameters()]
        assert len(set(ids)) == len(ids), "blocks share a parameter"
        sizes = [layout(list(block.parameters()))[1] for block in blocks[: self._count]]
        self._ends = [sum(sizes[: i + 1]) for i in range(self._count)]
        self._sizes = sizes
        self._host = HostMemory(sum(sizes))
        widest = [max(sizes[parity::2], default=0) for parity in range(2)]
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in widest]
        for buffer in self._buffers:
            self._order.adopt(buffer)
        for index, block in enumerate(blocks):
            self._place_block(index, block)
        if pin:
            self._host.page_lock(self._device)

    def _place_block(self, index: int, block: nn.Module) -> None:
        if index >= self._count:
            replace_parameters(block, lambda p: p.detach().to(self._device, copy=True))
            return
        offsets = iter(layout(list(block.parameters()))[0])

        def home_of(parameter: Tensor) -> Tensor:
            offset = next(offsets)
            tensor_at(self._source(index), offset, parameter).copy_(parameter)
            return tensor_at(self._buffers[index % 2], offset, parameter)

        replace_parameters(block, home_of)

    def _source(self, index: int) -> Tensor:
        return self._host.bytes[self._ends[index] - self._sizes[index] : self._ends[index]]

    def __len__(self) -> int:
        """How many blocks are streamed."""
        return self._count

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return self._host.bytes.numel()

    @property
    def device_bytes(self) -> int:
        """Bytes of both buffers."""
        return sum(buffer.numel() for buffer in self._buffers)

    def enter(self, index: int) -> None:
        """Called just before block `index` is: it is on the device for what is launched next, and the copy of the
        following block (of the next forward's first one, after the last) is under way."""
        self._open = index
        if index >= self._count:
            return
        self._order.mark()
        self._bring(index)
        self._order.use(index % 2)
        self._bring((index + 1) % self._count)

    def leave(self, index: int) -> None:
        """Called when the work of block `index` has been launched. Raises RuntimeError when another block was entered
        meanwhile, whose weights may have come in place of this one's. A forward that fails need not call it."""
        if self._open != index:
            raise RuntimeError(f"block {self._open} was entered within block {index}; streamed blocks run one by one")

    def _bring(self, index: int) -> None:
        """Queues the copy of a block, after all work that had been launched at the last `enter`."""
        place = index % 2
        if self._held[place] == index:
            return
        self._held[place] = None  # if what follows fails
        source = self._source(index)
        with self._order.copying(place):
            self._buffers[place][: source.numel()].copy_(source, non_blocking=True)
        self._held[place] = index
        self.copies += 1


class StreamedBlocks(nn.ModuleList):
    """A list of blocks whose iteration brings each block to the device; `first` is the number of its first block.

    Only iteration does: an index gives a block whose weights may be another's, and is refused.
    """

    def __init__(self, blocks: nn.ModuleList, stream: BlockStream, first: int) -> None:
        super().__init__(blocks)
        self.stream, self.first = stream, first

    def __iter__(self) -> Iterator[nn.Module]:
        for number, block in enumerate(list(self._modules.values())):
            assert block is not None, "a list of modules has no gaps"
            self.stream.enter(self.first + number)
            yield block
            self.stream.leave(self.first + number)

    def __getitem__(self, index: object) -> nn.Module:  # type: ignore[override]
        raise TypeError(
            "streamed blocks are called in a loop over all of them; by index their weights may be another's"
        )


def stream_blocks(model: nn.Module, names: Sequence[str], device: torch.device, *, pin: bool) -> BlockStream:
    """Replaces the lists of blocks `names` of a loaded model, in the order in which forward runs through them."""
    lists: dict[str, nn.ModuleList] = {}
    for name in names:
        child = model.get_submodule(name)
        assert isinstance(child, nn.ModuleList), f"{name} is a list of blocks"
        lists[name] = child
    stream = BlockStream(list(lists.values()), device, pin=pin)
    first = 0
    for name, blocks in lists.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, StreamedBlocks(blocks, stream, first))
        first += len(blocks)
    return stream
