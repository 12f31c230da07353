"""yunchang's long-context attention (`--sp-impl yunchang`), for CUDA with flash-attn only.

Its torch attention types return no log-sum-exp, so that every ring of more than one rank is silently wrong with them:
only flash-attn's type is ever asked for. yunchang keeps its process groups in a global of its own, set here; they are
numbered like ours. Checked by tests/gpu/test_sequence_gpu.py where both are installed.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from safelight.runtime.errors import ConfigError


def yunchang_attention(
    ulysses: int, ring: int, rank: int, world_size: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v: (B, S/sp, H, D) -> (B, S/sp, H, D) for S that divides by sp and H by ulysses; float16 or bfloat16.

    Collective over the worker group. Raises ConfigError when yunchang or flash-attn cannot be imported.
    """
    try:
        importlib.import_module("flash_attn")
        package: Any = importlib.import_module("yunchang")
        kernels: Any = importlib.import_module("yunchang.kernels")
    except ImportError as error:
        raise ConfigError(
            f"--sp-impl yunchang needs yunchang and flash-attn, and {error}; use --sp-impl native", param="sp_impl"
        ) from error
    logging.getLogger(__name__).warning("shapes that do not divide by the ranks run without yunchang")
    package.set_seq_parallel_pg(ulysses, ring, rank, world_size)
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = package.LongContextAttention(
        scatter_idx=2, gather_idx=1, ring_impl_type="basic", attn_type=kernels.AttnType.FA
    )
    return attention
