"""The arguments of one server (or of the processes behind one `generate`), under SGLang Diffusion's names."""

from __future__ import annotations

from dataclasses import dataclass

from safelight.configs.options import check_options, option
from safelight.runtime.errors import ConfigError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class ServerArgs:
    """Raises ConfigError naming the flag when a value is of the wrong type, unknown, or contradicts another.

    Precision `auto` is fp32 on a CPU (bf16 is about five times slower there) and bf16 on CUDA.
    """

    model_path: str | None = option(None, "directory in diffusers format or Hugging Face id; unset: the built-in model")
    vae_path: str | None = option(None, "directory or Hugging Face id of another VAE for the model")
    num_gpus: int = option(1, "workers over all replicas: one per GPU, or processes on a CPU", minimum=1)
    replicas: int = option(1, "independent copies of the model that share the workers evenly", minimum=1)
    device: str = option("auto", "where the model runs", choices=("auto", "cuda", "cpu"))
    dit_precision: str = option("auto", "of the transformer; auto is fp32 on a CPU, bf16 on CUDA", choices=PRECISIONS)
    vae_precision: str = option("auto", "of the VAE; auto is fp32 on a CPU, bf16 on CUDA", choices=PRECISIONS)
    policy: str = option("fair", "order of the jobs", choices=("fair", "fcfs", "sjf"))
    max_queue: int = option(1000, "jobs that may wait; more are refused", minimum=1)
    max_plan_ms: float | None = option(
        None, "bound of the work sent to a worker at once; unset: the longest step", minimum=1
    )
    checkpoint_every: int = option(0, "steps between checkpoints of a job's latents; 0: none", minimum=0)
    frame_slots: int = option(4, "buffers for decoded frames on their way to the encoder", minimum=1)
    state_dir: str | None = option(None, "folder of journal, checkpoints and artifacts; unset: a temporary one")
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

    @property
    def group_size(self) -> int:
        """Workers of each replica."""
        return self.num_gpus // self.replicas
