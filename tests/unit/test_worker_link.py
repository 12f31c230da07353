"""What a rank tells a new scheduler over real sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq

from safelight.runtime import transport
from safelight.runtime.messages import (
    ChunkReady,
    Endpoints,
    FromWorker,
    Heartbeat,
    Inventory,
    InventoryRequest,
    Plan,
    PreviewReady,
    SlotPool,
    TensorRef,
    WorkerSpec,
)
from safelight.runtime.worker.link import MAX_WAITING, Link


class Rig:
    """A rank's link, and the scheduler's end of it."""

    def __init__(self, folder: str, stack: ExitStack, *, started: bool = True) -> None:
        endpoints = Endpoints(*(f"ipc://{folder}/{name}" for name in Endpoints.__struct_fields__))
        spec = WorkerSpec(
            endpoints=endpoints,
            group=0,
            rank=0,
            world_size=1,
            group_epoch=0,
            local_rank=0,
            store="",
            model_path="",
            vae_path=None,
            device="cpu",
            dit_precision="fp32",
            vae_precision="fp32",
            checkpoint_dir="",
            slots=SlotPool("", 1, 1),
            num_threads=1,
            ranks_on_host=1,
            log_level="info",
        )
        context: zmq.Context[Any] = stack.enter_context(zmq.Context())
        self.scheduler = stack.enter_context(transport.bind_router(context, endpoints.plans, FromWorker))
        self.link = Link(spec, lambda: ())
        if started:
            self.link.start()
            stack.callback(self.link.close)
            self.receive(Heartbeat)

    def receive(self, kind: type[Any]) -> Any:
        while self.scheduler.socket.poll(5000):
            for received in self.scheduler.receive_all(limit=1):
                if isinstance(received.message, kind):
                    return received.message
        raise AssertionError(f"no {kind.__name__} came")

    def plan(self, scheduler_epoch: int, number: int) -> Plan:
        """Sends a plan and takes it out of the link's queue, as the executor does."""
        plan = Plan(scheduler_epoch, 0, 0, number, ())
        self.scheduler.send(plan, transport.worker_identity(0, 0, 0))
        assert self.link.plans.get(timeout=5) == plan
        return plan

    def inventory(self, scheduler_epoch: int) -> Inventory:
        self.scheduler.send(InventoryRequest(scheduler_epoch), transport.worker_identity(0, 0, 0))
        found: Inventory = self.receive(Inventory)
        return found


@pytest.fixture
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        yield Rig(str(Path(folder)), stack)


def test_a_plan_of_an_earlier_scheduler_does_not_pass_for_the_newest_one(rig: Rig) -> None:
    rig.link.note_done(rig.plan(1, 0))
    assert rig.inventory(2).last_done == 0
    running = rig.plan(2, 0)
    found = rig.inventory(3)
    assert (found.received_epoch, found.last_received, found.last_done) == (2, 0, -1)
    rig.link.note_done(running)
    assert rig.inventory(4).last_done == 0


def test_previews_do_not_pile_up_where_output_takes_nothing_and_chunks_are_kept() -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        link = Rig(folder, stack, started=False).link  # nothing is ever sent
        for number in range(2 * MAX_WAITING):
            preview = PreviewReady("a", 0, 0, number, 1, TensorRef((1, 1, 3), "uint8", 3, 0))
            link.send_preview(preview, memoryview(b"rgb"))
        link.send_chunk(ChunkReady("a", 0, 0, 0, 0, True, 0, 1, 1, 1, 3, 0))
        kept = [message for message, _ in link._to_output]
        assert len(kept) == MAX_WAITING + 1
        assert isinstance(kept[-1], ChunkReady)
