"""Streamed blocks and the host memory they come from, without a model; the order of copies and computations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from safelight.runtime.errors import ConfigError
from safelight.runtime.models.host_memory import HostMemory, layout, tensor_at
from safelight.runtime.models.streaming import BlockStream, HostOrder, stream_blocks

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two lists of blocks that differ in size."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(first))
        self.single_blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(second))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for block in self.single_blocks:
            x = block(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize(("first", "second"), [(3, 4), (2, 3), (1, 1), (1, 0), (0, 2), (4, 5)])
def test_two_lists_are_one_stream(first: int, second: int) -> None:
    torch.manual_seed(0)
    net, x = Net(first, second), torch.randn(2, 4)
    expected, names = net(x), [name for name, _ in net.named_parameters()]
    stream = stream_blocks(net, ("blocks", "single_blocks"), CPU, pin=True)  # on a CPU there is nothing to lock
    streamed = (first + second) // 2 * 2
    for forward in range(1, 4):
        assert torch.equal(net(x), expected)
        assert stream.copies == (streamed if streamed <= 2 else forward * streamed + 1)
    assert [name for name, _ in net.named_parameters()] == names
    assert (len(net.blocks), len(net.single_blocks)) == (first, second)


class TwoQueues(HostOrder):
    """What a device with two queues may assume of the order of its work, checked for the worst case: only what an event
    says has happened. Computations and copies are numbered in the order in which they are queued."""

    def __init__(self) -> None:
        self.computed = self.marked = self.copied = self.used = 0
        self.reader = [0, 0]  # of each buffer: the number of the last computation that reads it
        self.written = [0, 0]  # the number of the last copy into it
        self.early: list[str] = []

    def mark(self) -> None:
        self.marked = self.computed

    @contextmanager
    def copying(self, place: int) -> Iterator[None]:
        if self.marked < self.reader[place]:
            self.early.append(f"copy {self.copied} into {place} may come before computation {self.reader[place]}")
        yield
        self.copied += 1
        self.written[place] = self.copied

    def use(self, place: int) -> None:
        self.used = max(self.used, self.written[place])

    def compute(self, place: int) -> None:
        self.computed += 1
        self.reader[place] = self.computed
        if self.used < self.written[place]:
            self.early.append(f"computation {self.computed} may come before copy {self.written[place]}")


def queue_forwards(order: TwoQueues, count: int) -> BlockStream:
    """Three forwards, of which the second one ends in the middle."""
    lists = [nn.ModuleList(nn.Linear(2, 2) for _ in range(count))]
    stream = BlockStream(lists, CPU, pin=False, order=order)
    for blocks in (count, count // 2, count):
        for index in range(blocks):
            stream.enter(index)
            if index < len(stream):
                order.compute(index % 2)
            stream.leave(index)
    return stream


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 9])
def test_no_copy_and_no_computation_comes_too_early(count: int) -> None:
    order = TwoQueues()
    stream = queue_forwards(order, count)
    assert order.early == []
    assert order.copied == stream.copies
    assert order.computed >= 2 * len(stream)


@pytest.mark.parametrize("missing", ["mark", "use"])
def test_each_event_is_needed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwoQueues, missing, lambda *_: None)
    order = TwoQueues()
    queue_forwards(order, 6)
    assert order.early


def test_streamed_blocks_are_refused_by_index_and_side_by_side() -> None:
    net = Net(2, 2)
    stream_blocks(net, ("blocks", "single_blocks"), CPU, pin=False)
    with pytest.raises(TypeError, match="loop over all of them"):
        net.blocks[1]
    with pytest.raises(RuntimeError, match="one by one"):
        for _ in zip(net.blocks, net.single_blocks, strict=True):
            pass
    assert net(torch.zeros(1, 4)).shape == (1, 4)


def test_packed_tensors_keep_shapes_and_values() -> None:
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.int64), torch.ones(1).bfloat16(), torch.zeros(0, 4)]
    offsets, total = layout(tensors)
    memory = HostMemory(total)
    assert offsets == [0, 256, 512, 768]
    assert total == memory.bytes.numel() == 768
    for offset, tensor in zip(offsets, tensors, strict=True):
        tensor_at(memory.bytes, offset, tensor).copy_(tensor)
    for offset, tensor in zip(offsets, tensors, strict=True):
        assert torch.equal(tensor_at(memory.bytes, offset, tensor), tensor)


class CudaRuntime:
    """Registers pages as CUDA does, or answers with an error."""

    def __init__(self, code: int) -> None:
        self.code, self.locked = code, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.locked[address] = size
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_whole_pages_are_locked_as_long_as_the_memory_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = CudaRuntime(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    memories = [HostMemory(nbytes) for nbytes in (1, 4096, 5000, 0)]
    for memory in memories:
        memory.page_lock(CPU)
    assert [(address % 4096, size) for address, size in runtime.locked.items()] == [(0, 4096), (0, 4096), (0, 8192)]
    ranges = sorted((address, address + size) for address, size in runtime.locked.items())
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    del memory, memories
    assert not runtime.locked


def test_a_host_that_locks_no_memory_is_told_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: CudaRuntime(2))
    with pytest.raises(ConfigError, match="--no-pin-cpu-memory") as caught:
        HostMemory(1).page_lock(CPU)
    assert caught.value.param == "pin_cpu_memory"
