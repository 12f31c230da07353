"""From server arguments to the specification that each child process gets."""

from __future__ import annotations

from pathlib import Path

from msgspec import structs

from safelight.configs.backend import check_backend
from safelight.configs.encoder_parallel import EncoderShares, choose_encoder_shares
from safelight.configs.families import FAMILIES, identify
from safelight.configs.parallel import Degrees, check_implementations, choose_degrees
from safelight.configs.server_args import ServerArgs
from safelight.runtime.launch.devices import host_id, usable_cores
from safelight.runtime.launch.folders import RunFolder
from safelight.runtime.launch.processes import Group
from safelight.runtime.messages import Endpoints, Join, OutputSpec, SchedulerSpec, SlotPool, Welcome, WorkerSpec


def scheduler_spec(args: ServerArgs, run: RunFolder, pool: SlotPool, model: Path) -> SchedulerSpec:
    return SchedulerSpec(
        endpoints=endpoints_of(args, run),
        journal=str(run.journal),
        checkpoint_dir=str(run.checkpoints),
        model_path=str(model),
        groups=args.replicas,
        world_size=args.group_size,
        slots=pool,
        policy=args.policy,
        max_queue=args.max_queue,
        max_plan_ms=args.max_plan_ms,
        checkpoint_every=args.checkpoint_every,
        log_level=args.log_level,
        keys=args.keys,
        artifact_ttl_s=args.artifact_ttl_s,
        artifact_quota_bytes=None if args.artifact_quota_mb is None else round(args.artifact_quota_mb * 1e6),
        backend=args.backend,
        trust_remote_code=args.trust_remote_code,
        input_dir=str(run.inputs),
    )


def output_spec(args: ServerArgs, run: RunFolder, pool: SlotPool) -> OutputSpec:
    return OutputSpec(
        endpoints=endpoints_of(args, run),
        artifact_dir=str(run.artifacts),
        slots=pool,
        encode_threads=max(1, min(4, usable_cores() // 2)),
        log_level=args.log_level,
        keys=args.keys,
    )


def endpoints_of(args: ServerArgs, run: RunFolder) -> Endpoints:
    """ipc in the run's folder; what ranks of other hosts connect to is on the two ports after --worker-endpoint's."""
    endpoints = run.endpoints()
    if args.worker_port is None:
        return endpoints
    plans, chunks = (f"{args.worker_host}:{args.worker_port + i}" for i in (1, 2))
    return structs.replace(endpoints, plans=plans, chunks=chunks)


def degrees_of(args: ServerArgs, model: Path) -> Degrees:
    """The layout of every group for the model in that directory. Raises ConfigError (arguments that its backend does
    not take, too) and ModelError."""
    spec = identify(model, args.backend, args.trust_remote_code)
    check_backend(args, spec)
    family = FAMILIES[spec.family]
    if not family.capabilities.spans_ranks:
        return Degrees()
    return choose_degrees(args.wanted_degrees, family.attention_of(spec).heads, family.guided_by_default(spec))


def encoder_shares_of(args: ServerArgs, model: Path, device: str) -> EncoderShares:
    """How the ranks of every group share the text encoder. Raises ConfigError and ModelError."""
    spec = identify(model, args.backend, args.trust_remote_code)
    shape = FAMILIES[spec.family].encoder_of(spec)
    return choose_encoder_shares(args.tp_size, shape, args.group_size, device)


def check_layout(args: ServerArgs, model: Path) -> None:
    """Raises ConfigError and ModelError for degrees that this model cannot have, whatever the device."""
    degrees_of(args, model)
    encoder_shares_of(args, model, "cpu")


def precisions(args: ServerArgs, device: str) -> tuple[str, str]:
    """Of transformer and VAE; `auto` is fp32 on a CPU, bf16 on CUDA."""
    automatic = "bf16" if device == "cuda" else "fp32"
    dit, vae = (automatic if given == "auto" else given for given in (args.dit_precision, args.vae_precision))
    return dit, vae


def worker_spec(
    args: ServerArgs, run: RunFolder, pool: SlotPool, model: Path, device: str, group: Group, rank: int
) -> WorkerSpec:
    """The spec of one rank. Raises ConfigError and ModelError."""
    world_size, degrees = args.group_size, degrees_of(args, model)
    check_implementations(args.sp_impl, args.attention_backend, degrees, device)
    encoder = encoder_shares_of(args, model, device)
    dit_precision, vae_precision = precisions(args, device)
    return WorkerSpec(
        endpoints=endpoints_of(args, run),
        group=group.number,
        rank=rank,
        world_size=world_size,
        group_epoch=group.epoch,
        local_rank=group.number * world_size + rank,
        store=f"file://{run.root / f'store-{group.number}-{group.epoch}'}",
        model_path=str(model),
        vae_path=args.vae_path,
        device=device,
        dit_precision=dit_precision,
        vae_precision=vae_precision,
        checkpoint_dir=str(run.checkpoints),
        slots=pool,
        num_threads=max(1, usable_cores() // (2 * args.num_gpus)) if device == "cpu" else 1,  # spinning threads suffer
        ranks_on_host=args.num_gpus,
        log_level=args.log_level,
        cfg_degree=degrees.cfg,
        ring_degree=degrees.ring,
        ulysses_degree=degrees.ulysses,
        sp_impl=args.sp_impl,
        ulysses_transport=args.ulysses_transport,
        attention_backend=args.attention_backend,
        vae_tiling=args.vae_tiling,
        tp_size=encoder.tp,
        encoder_sets=encoder.sets,
        interface=args.interface,
        input_dir=str(run.inputs),
        backend=args.backend,
        trust_remote_code=args.trust_remote_code,
        vae_slicing=args.vae_slicing,
        diffusers_attention_backend=args.diffusers_attention_backend,
        diffusers_kwargs=args.diffusers_kwargs or {},
        offload=args.offloaded,
        pin_cpu_memory=args.pin_cpu_memory,
        cuda_graphs=args.cuda_graphs,
    )


def welcome(
    args: ServerArgs, run: RunFolder, pool: SlotPool, model: Path, join: Join, group: Group, rank: int
) -> Welcome:
    """The same for a rank that torchrun started. Its host completes it: model directory, keys, slots, threads."""
    spec = structs.replace(
        worker_spec(args, run, pool, model, join.device, group, rank),
        local_rank=join.local_rank,
        ranks_on_host=join.local_world_size,
        store=f"env://{run.root.name}-{group.number}-{group.epoch}",
    )
    named = args.model_path and (str(model) if Path(args.model_path).expanduser().exists() else args.model_path)
    return Welcome(spec, named, host_id(), run.marker.name)
