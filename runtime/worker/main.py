"""A rank's process: joins its group, loads the model, executes plans until told to stop or its supervisor is gone."""

from __future__ import annotations

import gc
import logging
import os
import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import msgspec
import torch
import torch.distributed as dist

from safelight.configs.env import interface_variables
from safelight.runtime import logs
from safelight.runtime.errors import ConfigError, SafelightError
from safelight.runtime.messages import GroupFailed, HeldState, PhaseReport, Ready, WorkerSpec
from safelight.runtime.models.registry import LoadOptions, Residency, load_pipeline
from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh
from safelight.runtime.pipelines.protocol import Pipeline
from safelight.runtime.worker.checkpoint import CheckpointWriter
from safelight.runtime.worker.completer import Completer
from safelight.runtime.worker.executor import Executor, error_info
from safelight.runtime.worker.link import Link
from safelight.runtime.worker.memory import device_memory
from safelight.runtime.worker.torch_store import ENV_STORE, torchrun_store

LOADING_LIMIT_S = 1800.0
COLLECTIVE_TIMEOUT_S = 600.0  # a stuck collective ends earlier, by the scheduler's op deadline
log = logging.getLogger(__name__)


def main(spec_bytes: bytes, status: Connection) -> None:
    """Runs one rank. `status` carries encoded PhaseReport, Ready and GroupFailed to the supervisor; its other end
    closing means that the supervisor is gone, and ends the process at once."""
    spec = msgspec.msgpack.decode(spec_bytes, type=WorkerSpec)
    threading.Thread(target=_exit_with_supervisor, args=(status,), name="parent", daemon=True).start()
    run(spec, lambda message: status.send_bytes(msgspec.msgpack.encode(message)))


def run(spec: WorkerSpec, tell: Callable[[PhaseReport | Ready | GroupFailed], None]) -> NoReturn:
    """Runs one rank and ends the process. `tell` brings its status to the supervisor, failures for certain."""
    logs.configure(f"worker {spec.group}.{spec.rank}", spec.log_level)
    torch.set_num_threads(spec.num_threads)
    os.environ.update(interface_variables(spec.interface, os.environ))
    executors: list[Executor] = []

    def held() -> tuple[HeldState, ...]:
        return executors[0].held() if executors else ()

    link = Link(spec, held)
    link.start()

    try:
        with torch.inference_mode():
            _serve(spec, link, tell, executors)
    except Exception as error:  # the process main: whatever it is ends this group, with its reason
        log.error("rank ends: %s", error, exc_info=_is_ours(spec, error))
        failed = GroupFailed(spec.group, spec.rank, spec.group_epoch, error_info(error))
        link.send(failed)
        tell(failed)
        link.close()
        os._exit(1)
    link.close()
    os._exit(0)  # no teardown of communicators whose peers may be gone


def _serve(
    spec: WorkerSpec,
    link: Link,
    tell: Callable[[PhaseReport | Ready | GroupFailed], None],
    executors: list[Executor],
) -> None:
    phase = PhaseReport(spec.group, spec.rank, spec.group_epoch, "loading", LOADING_LIMIT_S)
    link.send(phase)
    tell(phase)
    device = _device(spec)
    options = _options(spec, device)
    pipeline = _load(spec, options)
    weights = pipeline.weights_bytes()
    checkpoints = CheckpointWriter(Path(spec.checkpoint_dir) if spec.checkpoint_dir else None)
    failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()

    def fatal(error: Exception) -> None:
        failures.put(error)
        link.plans.put(None)

    completer = Completer(spec, link, device, weights, fatal)
    executor = Executor(pipeline, spec, checkpoints, link.send)
    executors.append(executor)
    ready = _ready(spec, device, weights, options)
    link.announce_ready(ready)
    tell(ready)
    log.info("ready on %s, %.2f GB of weights on it", ready.device, weights / 1e9)
    gc.freeze()  # what is loaded stays; collections look at requests only
    while (plan := link.plans.get()) is not None:
        completer.submit(executor.execute(plan))
    completer.close()
    checkpoints.close()
    if not failures.empty():
        raise failures.get()


def _is_ours(spec: WorkerSpec, error: Exception) -> bool:
    """Whether a traceback helps: not for typed errors, nor for a collective that a dead peer broke."""
    return not isinstance(error, SafelightError) and not (spec.world_size > 1 and isinstance(error, RuntimeError))


def _exit_with_supervisor(status: Connection) -> None:
    try:
        status.recv_bytes()
    except (EOFError, OSError):
        os._exit(0)


def _device(spec: WorkerSpec) -> torch.device:
    if spec.device != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu", param="device")
    if spec.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus needs device {spec.local_rank}, torch sees {torch.cuda.device_count()}", param="num_gpus"
        )
    device = torch.device("cuda", spec.local_rank)
    torch.cuda.set_device(device)
    return device


def _options(spec: WorkerSpec, device: torch.device) -> LoadOptions:
    return LoadOptions(
        device=device,
        dit_dtype=_dtype(spec.dit_precision),
        vae_dtype=_dtype(spec.vae_precision),
        vae_path=Path(spec.vae_path) if spec.vae_path else None,
        mesh=_mesh(spec, device),
        vae_tiling=spec.vae_tiling,
        attention_backend=spec.attention_backend,
        input_dir=Path(spec.input_dir) if spec.input_dir else None,
        backend=spec.backend,
        trust_remote_code=spec.trust_remote_code,
        vae_slicing=spec.vae_slicing,
        diffusers_attention_backend=spec.diffusers_attention_backend,
        diffusers_kwargs=spec.diffusers_kwargs,
        offload=spec.offload,
        pin_cpu_memory=spec.pin_cpu_memory,
        cuda_graphs=spec.cuda_graphs,
    )


def _load(spec: WorkerSpec, options: LoadOptions) -> Pipeline:
    pipeline = load_pipeline(Path(spec.model_path), options)
    _tell_residency(spec, options.residency)
    return pipeline


def _tell_residency(spec: WorkerSpec, residency: Residency) -> None:
    """What is offloaded; and once per server a warning for each flag that has nothing to move."""
    if described := residency.describe():
        log.info("offloaded, %s", described)
    for name in residency.unused() if (spec.group, spec.rank) == (0, 0) else ():
        log.warning("--%s-cpu-offload does nothing: this model has no such component", name.replace("_", "-"))


def _dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _mesh(spec: WorkerSpec, device: torch.device) -> ParallelMesh:
    if spec.world_size == 1:
        return ParallelMesh.single()
    torchrun = spec.store.startswith(ENV_STORE)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=None if torchrun else spec.store,
        store=torchrun_store(spec.store.removeprefix(ENV_STORE)) if torchrun else None,
        rank=spec.rank,
        world_size=spec.world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    world = dist.group.WORLD
    assert world is not None
    degrees = spec.cfg_degree, spec.ring_degree, spec.ulysses_degree
    log.info("cfg %d x ring %d x ulysses %d, tp %d", *degrees, spec.tp_size)
    encoder = spec.tp_size, spec.encoder_sets
    return build_mesh(world, *degrees, sp_impl=spec.sp_impl, encoder=encoder, transport=spec.ulysses_transport)


def _ready(spec: WorkerSpec, device: torch.device, weights: int, options: LoadOptions) -> Ready:
    memory = device_memory(device, spec.ranks_on_host, weights)
    return Ready(
        group=spec.group,
        rank=spec.rank,
        world_size=spec.world_size,
        group_epoch=spec.group_epoch,
        capacity_bytes=memory.capacity,
        weights_bytes=weights,
        reserve_bytes=memory.reserve + options.graphs.room,
        device=memory.name,
        encode_bytes=options.residency.encode_bytes,
    )
