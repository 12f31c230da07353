"""The arguments of one server (or of the processes behind one `generate`), under SGLang Diffusion's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safelight.configs.network import check_address, check_endpoint, check_interface
from safelight.configs.options import check_options, option
from safelight.configs.parallel import WantedDegrees
from safelight.runtime.errors import ConfigError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OFFLOADABLE = ("dit", "text_encoder", "image_encoder", "vae")
BACKENDS = ("auto", "safelight", "diffusers")


@dataclass(frozen=True, slots=True)
class ServerArgs:
    """Raises ConfigError naming the flag when a value is of the wrong type, unknown, or contradicts another.

    Precision `auto` is fp32 on a CPU (bf16 is about five times slower there) and bf16 on CUDA.
    """

    model_path: str | None = option(None, "directory in diffusers format or Hugging Face id; unset: the built-in model")
    vae_path: str | None = option(None, "directory or Hugging Face id of another VAE for the model")
    num_gpus: int = option(1, "workers over all replicas: one per GPU, or processes on a CPU", minimum=1)
    replicas: int = option(1, "independent copies of the model that share the workers evenly", minimum=1)
    sp_degree: int | None = option(None, "ranks that share one sequence: ulysses x ring; unset: chosen", minimum=1)
    ulysses_degree: int | None = option(None, "ranks that share the attention heads; unset: chosen", minimum=1)
    ring_degree: int | None = option(None, "ranks that keys and values travel around; unset: chosen", minimum=1)
    cfg_parallel_degree: int | None = option(
        None, "2: the two predictions of guidance side by side, 1: not; unset: chosen", minimum=1
    )
    tp_size: int | None = option(None, "ranks that share the text encoder's matrices; unset: chosen", minimum=1)
    sp_impl: str = option("native", "sequence parallelism by", choices=("native", "yunchang"))
    ulysses_transport: str = option(
        "auto",
        "how GPUs exchange heads: auto writes into each other's memory where they can, nccl sends messages",
        choices=("auto", "nccl"),
    )
    attention_backend: str = option(
        "auto", "attention kernels: torch's, or flash-attn's (fa)", choices=("auto", "torch_sdpa", "fa")
    )
    worker_endpoint: str | None = option(
        None,
        "tcp://ADDRESS:PORT where ranks that torchrun started join, also on the two ports after it; unset: ranks are "
        "started here",
    )
    keys: str | None = option(None, "folder of key files made by `safelight keys`, for tcp endpoints")
    interface: str | None = option(None, "network interface of NCCL and gloo; unset: they choose")
    backend: str = option("auto", "native families, any pipeline of diffusers, or the best of both", choices=BACKENDS)
    trust_remote_code: bool = option(False, "let a checkpoint for diffusers run Python code of its own")
    diffusers_attention_backend: str | None = option(None, "attention of diffusers' transformers, by diffusers' names")
    diffusers_kwargs: dict[str, Any] | None = option(  # noqa: RUF009 - a mapping that nobody changes
        None, "further arguments for every call of a pipeline of diffusers", file_only=True
    )
    device: str = option("auto", "where the model runs", choices=("auto", "cuda", "cpu"))
    dit_precision: str = option("auto", "of the transformer; auto is fp32 on a CPU, bf16 on CUDA", choices=PRECISIONS)
    vae_precision: str = option("auto", "of the VAE; auto is fp32 on a CPU, bf16 on CUDA", choices=PRECISIONS)
    vae_tiling: bool = option(False, "decode in bands: the same pictures with less memory, a little slower")
    vae_slicing: bool = option(False, "decode the pictures of a batch one by one (diffusers only)")
    dit_cpu_offload: bool = option(
        False, "transformer in host memory, brought to the GPU layer by layer while it computes"
    )
    text_encoder_cpu_offload: bool = option(False, "text encoders in host memory, on the GPU while they encode")
    image_encoder_cpu_offload: bool = option(False, "image encoder in host memory, on the GPU while it encodes")
    vae_cpu_offload: bool = option(False, "VAE in host memory, on the GPU while it decodes")
    pin_cpu_memory: bool = option(
        True, "page-lock that host memory: without it copies are slow and steps wait for them"
    )
    cuda_graphs: bool = option(
        True, "record forwards and launch them as one: GPUs that are faster than Python do not wait for it (CUDA only)"
    )
    policy: str = option("fair", "order of the jobs", choices=("fair", "fcfs", "sjf"))
    max_queue: int = option(1000, "jobs that may wait; more are refused", minimum=1)
    max_plan_ms: float | None = option(
        None, "bound of the work sent to a worker at once; unset: the longest step", minimum=1
    )
    checkpoint_every: int = option(0, "steps between checkpoints of a job's latents; 0: none", minimum=0)
    frame_slots: int = option(4, "buffers for decoded frames on their way to the encoder", minimum=1)
    state_dir: str | None = option(None, "folder of journal, checkpoints and artifacts; unset: a temporary one")
    artifact_ttl_s: float | None = option(
        None, "seconds after its end that a job and its files are kept; unset: no limit", minimum=1
    )
    artifact_quota_mb: float | None = option(
        None, "megabytes of results above which the oldest are deleted; unset: no limit", minimum=0.001
    )
    startup_timeout_s: float = option(1800.0, "seconds until all workers must be ready", minimum=1)
    drain_grace_s: float = option(30.0, "seconds that running jobs get to finish after SIGTERM", minimum=0)
    log_level: str = option("warning", "of every process", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        check_options(self, ConfigError)
        if self.num_gpus % self.replicas:
            raise ConfigError(
                f"--num-gpus {self.num_gpus} does not divide into --replicas {self.replicas}; every replica takes the "
                "same number of workers",
                param="replicas",
            )
        self.wanted_degrees.layouts()
        if self.tp_size is not None and self.group_size % self.tp_size:
            raise ConfigError(
                f"--tp-size {self.tp_size} does not divide the {self.group_size} workers of a replica (--num-gpus "
                f"{self.num_gpus}, --replicas {self.replicas}); each set of so many ranks holds one text encoder",
                param="tp_size",
            )
        if self.worker_endpoint is not None:
            check_endpoint("worker_endpoint", self.worker_endpoint, self.keys)
            if self.worker_port is not None:
                check_address(self.worker_host.removeprefix("tcp://"))
        elif self.interface is not None:
            check_interface(self.interface)

    @property
    def wanted_degrees(self) -> WantedDegrees:
        return WantedDegrees(
            self.num_gpus,
            self.group_size,
            cfg_parallel_degree=self.cfg_parallel_degree,
            sp_degree=self.sp_degree,
            ring_degree=self.ring_degree,
            ulysses_degree=self.ulysses_degree,
        )

    @property
    def worker_host(self) -> str:
        """`tcp://ADDRESS` of --worker-endpoint."""
        return (self.worker_endpoint or "").rpartition(":")[0]

    @property
    def worker_port(self) -> int | None:
        """None: workers are on this host only."""
        tcp = self.worker_endpoint is not None and self.worker_endpoint.startswith("tcp://")
        return int(self.worker_endpoint.rpartition(":")[2]) if tcp and self.worker_endpoint else None

    @property
    def offloaded(self) -> tuple[str, ...]:
        """The components whose weights live on the CPU."""
        return tuple(name for name in OFFLOADABLE if getattr(self, f"{name}_cpu_offload"))

    @property
    def group_size(self) -> int:
        """Workers of each replica."""
        return self.num_gpus // self.replicas
