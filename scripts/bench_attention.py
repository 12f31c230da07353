#!/usr/bin/env python
"""Milliseconds and TFLOP/s of every attention kernel on one GPU, with and without its log-sum-exp, and its error.

    PYTHONPATH=src python scripts/bench_attention.py [--reps 5] [--device cpu --tiny]

Prints one JSON line. Shapes are those of Wan 1.3B and 14B (480p), Wan 1.3B (720p) and FLUX (1024), head dim 128. Inputs
are laid out as the model gives them: (B, S, H, D), v a slice of the fused projection; `ulysses` is what an all-to-all
leaves, tokens outermost. Errors are relative L2 distances from float32, on the first queries; of the log-sum-exp the
largest. A kernel that cannot run is reported with its error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from checkout import commit
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from safelight.kernels.dispatch import select_kernels
from safelight.kernels.fused_attention import aten_attention_lse
from safelight.kernels.reference.attention import attention_lse as definition

SHAPES = {"wan_1.3b_480p": (12, 32760), "wan_14b_480p": (40, 32760), "wan_1.3b_720p": (12, 75600), "flux": (24, 4608)}
TINY = {"tiny": (3, 130)}
DIM = 128
CHECKED = 64  # queries whose results are compared
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Kernel = Callable[[Tensor, Tensor, Tensor], Any]


def layouts(heads: int, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """The same values (1, S, H, D) in other strides."""
    generator = torch.Generator(device).manual_seed(0)
    fused = torch.randn(1, tokens, 3, heads, DIM, generator=generator, device=device, dtype=torch.float32).to(dtype)
    q, k, v = fused.unbind(2)
    by_head = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return {"model": (q.contiguous(), k.contiguous(), v), "by_head": by_head, "ulysses": (q, k, v)}


def public(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def kernels(device: torch.device) -> dict[str, Kernel]:
    ours = select_kernels(device)
    found: dict[str, Kernel] = {"ours": ours.attention, "ours_lse": ours.attention_lse}
    if device.type == "cuda":
        for name, backend in BACKENDS.items():
            found[name] = partial(public, backend)
            found[f"{name}_lse"] = partial(aten_attention_lse, name)
    return found


def milliseconds(call: Callable[[], Any], device: torch.device, reps: int) -> float:
    times = []
    for _ in range(reps + 1):
        if device.type != "cuda":
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])


def errors(made: Any, exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    out, lse = made if isinstance(made, tuple) else (made, None)
    distance = (out[:, :CHECKED].float() - exact[0]).norm() / exact[0].norm()
    found = {"l2": round(float(distance), 6)}
    if lse is not None:
        found["lse_max"] = round(float((lse[:, :CHECKED] - exact[1]).abs().max()), 6)
    return found


def measure(shape: tuple[int, int], device: torch.device, reps: int) -> dict[str, Any]:
    heads, tokens = shape
    found: dict[str, Any] = {"heads": heads, "tokens": tokens}
    tflop = 4.0 * heads * tokens**2 * DIM / 1e12
    inputs = layouts(heads, tokens, torch.bfloat16, device)
    q, k, v = inputs["model"]
    parts = [definition(q[:, :CHECKED, h : h + 1].float(), k[:, :, h : h + 1].float(), v[:, :, h : h + 1].float())
             for h in range(heads)]  # fmt: skip
    exact = torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2)
    for name, kernel in kernels(device).items():
        for layout, sample in inputs.items():
            if layout != "model" and not name.startswith("ours"):
                continue
            label = name if layout == "model" else f"{name}_{layout}"
            try:
                accuracy = errors(kernel(*sample), exact)
                ms = milliseconds(lambda f=kernel, s=sample: f(*s), device, reps)  # type: ignore[misc]
                found[label] = {"ms": round(ms, 3), "tflops": round(tflop / ms * 1e3, 1), **accuracy}
            except (RuntimeError, NotImplementedError) as error:
                found[label] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the attention kernels of one GPU.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small shape")
    parser.add_argument("--reps", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    with torch.inference_mode():
        found = {shape: measure(size, device, args.reps) for shape, size in (TINY if args.tiny else SHAPES).items()}
    print(json.dumps({"commit": commit(), "device": name, "torch": torch.__version__, **found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
