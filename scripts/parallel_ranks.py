"""One rank of `bench_parallel.py`: makes the world once, then runs the cases that it is given, in order.

Ranks agree through the store, not through collectives, so that a rank whose collective failed can still say so. What a
case raises alike on all ranks is its result; after any other failure the ranks end, and the parent starts new ones for
the cases that are left.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import parallel_trace
import torch
import torch.distributed as dist
from parallel_plan import Case, Settings

from safelight.configs.parallel import Degrees
from safelight.kernels.dispatch import KernelSet, select_kernels
from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh

POLL_S = 0.002
STOPPED = "stopped"
FAILED_S = 10.0  # a failed rank waits so long for the others, which may hang in a collective


class Stopped(Exception):
    """Another rank failed in this case."""


@dataclass
class Peers:
    """What ranks tell each other about one case."""

    store: dist.Store
    rank: int
    size: int
    limit_s: float
    case: str = ""
    turn: int = 0

    def begin(self, case: str) -> None:
        self.case, self.turn = case, 0

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Raises Stopped when one has failed."""
        self.turn += 1
        self.store.set(f"{self.case}/{self.turn}/{self.rank}", json.dumps(value))
        return [json.loads(self._wait(f"{self.case}/{self.turn}/{rank}")) for rank in range(self.size)]

    def end(self, error: str | None) -> list[str | None]:
        """Tells how the case ended here; returns every rank's error, of those that tell theirs soon enough."""
        if error is not None:
            self.store.set(f"{self.case}/failed", "1")
        self.store.set(f"{self.case}/end/{self.rank}", json.dumps(error))
        errors: list[str | None] = []
        for rank in range(self.size):
            try:
                errors.append(json.loads(self._wait(f"{self.case}/end/{rank}", FAILED_S if error else self.limit_s)))
            except TimeoutError as waited:
                errors.append(f"{STOPPED}: {waited}")
        return errors

    def _wait(self, key: str, limit_s: float | None = None) -> bytes:
        deadline = time.monotonic() + (limit_s or self.limit_s)
        while not self.store.check([key]):
            if limit_s is None and self.store.check([f"{self.case}/failed"]):
                raise Stopped(self.case)
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {self.rank} waited in vain for {key}")
            time.sleep(POLL_S)
        found: bytes = self.store.get(key)
        return found


@dataclass
class World:
    """All ranks, and what cases may keep for later ones."""

    group: dist.ProcessGroup
    device: torch.device
    kernels: KernelSet
    peers: Peers
    settings: Settings
    meshes: dict[Degrees, ParallelMesh] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.peers.size

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def mesh(self, degrees: Degrees) -> ParallelMesh:
        """One rank alone (every rank then does the same work beside the others), or a layout of the whole world."""
        if degrees.world_size == 1:
            return ParallelMesh.single()
        if degrees not in self.meshes:
            sizes = degrees.cfg, degrees.ring, degrees.ulysses
            self.meshes[degrees] = build_mesh(self.group, *sizes, transport=self.settings.transport)
        return self.meshes[degrees]

    def keep(self, name: str, build: Callable[[], Any]) -> Any:
        """What `build` made under this name; anything else that was kept is freed first."""
        if name not in self.kept:
            self.kept.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.kept[name] = build()
        return self.kept[name]

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Most memory allocated since `forget_peak`, on this rank."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def align(self) -> None:
        """From here on all ranks' devices start together."""
        if self.device.type == "cuda":
            dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
        else:
            dist.barrier(self.group)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], object]) -> list[float]:
        """Milliseconds of one call on every rank's device."""
        self.align()
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return self.peers.exchange((time.perf_counter() - start) * 1e3)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return self.peers.exchange(begin.elapsed_time(end))

    def median(self, call: Callable[[], object], across: Callable[[list[float]], float] = max) -> dict[str, Any]:
        """The median over repetitions of what the ranks took, as many as fit into `reps_s` (at least one).

        `across`: max where the ranks work on one thing.
        """
        times = [across(self.time(call))]
        while len(times) < self.settings.reps and sum(times) + times[0] < self.settings.reps_s * 1e3:
            times.append(across(self.time(call)))
        spread = [round(min(times), 3), round(max(times), 3)]
        return {"ms": round(statistics.median(times), 3), "range_ms": spread, "reps": len(times)}

    def trace(self, call: Callable[[], object]) -> dict[str, Any]:
        """Where the time of one call goes on rank 0; all ranks make the call."""
        found: dict[str, Any] = {}
        if self.peers.rank == 0:
            found = parallel_trace.traced(call, self.device, self.align)
        else:
            self.align()
            call()
            self.wait()
        return found


def errors_alike(errors: list[str | None]) -> bool:
    """Whether every rank raised the same and the device can be used on: then the ranks can go on together."""
    first = errors[0]
    return first is not None and all(e == first for e in errors) and "CUDA" not in first and "NCCL" not in first


def run_case(world: World, number: int, case: Case) -> tuple[dict[str, Any], bool]:
    """The case's result, or what it raised, and whether the ranks can go on."""
    from parallel_cases import CASES

    world.peers.begin(f"{number}")
    error, result = None, dict[str, Any]()
    try:
        with torch.inference_mode(case.part != "diffusers"), torch.no_grad():
            result = CASES[case.part](world, case)
            world.wait()
    except Stopped:
        error = f"{STOPPED}: another rank failed"
    except Exception as raised:  # one failing case must not lose the others
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}"[:600]
    errors = world.peers.end(error)
    if not any(errors):
        return result, True
    told = sorted((e for e in errors if e is not None), key=lambda e: e.startswith(STOPPED))
    return {"error": told[0]}, errors_alike(errors)


def main(
    rank: int, size: int, folder: str, cases: list[tuple[int, Case]], settings: Settings, told: Connection
) -> None:
    """Rank 0 tells the parent: (None, facts) once, (number, None) when a case starts, (number, result) when it ends."""
    torch.set_num_threads(1)
    cuda = settings.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=settings.case_s + 30)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=limit)
    assert dist.group.WORLD is not None
    peers = Peers(dist.PrefixStore("bench", store), rank, size, settings.case_s)
    world = World(dist.group.WORLD, device, select_kernels(device), peers, settings)
    if rank == 0:
        name = torch.cuda.get_device_name(device) if cuda else "cpu"
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else None
        told.send((None, {"device": name, "torch": torch.__version__, "nccl": nccl}))
    for number, case in cases:
        if rank == 0:
            told.send((number, None))
        result, usable = run_case(world, number, case)
        if rank == 0:
            told.send((number, result))
        if not usable:
            os._exit(1)  # collectives may hang, and destroying their group would
    dist.destroy_process_group()
