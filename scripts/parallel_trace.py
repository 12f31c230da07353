"""One call's time on a GPU, taken apart with torch's profiler: computing, communicating, both, neither."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

Span = tuple[float, float]
CLASSES = {  # of kernels, by parts of their names; the first that fits
    "communication": ("nccl", "gloo:", "_push_", "symmetric_memory::barrier"),
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "::mm"),
}


def union(spans: Iterable[Span]) -> list[Span]:
    """The same points in disjoint spans, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in union(spans))


def kind(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, parts in CLASSES.items() if any(part in lowered for part in parts)), "passes")


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of a trace's kernels and copies (`ts` and `dur` in microseconds).

    `exposed`: a collective runs and nothing else does; `hidden`: it runs beside something. A collective's time includes
    waiting for the other ranks. `idle`: nothing runs between the first and the last event.
    """
    spans: dict[str, list[Span]] = {"communication": [], "compute": []}
    kinds, names = Counter[str](), Counter[str]()
    for event in events:
        found, span = kind(event["name"]), (event["ts"], event["ts"] + event["dur"])
        spans["communication" if found == "communication" else "compute"].append(span)
        kinds[found] += event["dur"]
        names[event["name"][:70]] += event["dur"]
    whole = [*spans["communication"], *spans["compute"]]
    if not whole:
        return {"error": "the profiler saw no kernels"}
    span = max(end for _, end in whole) - min(start for start, _ in whole)
    busy, communicating, computing = length(whole), length(spans["communication"]), length(spans["compute"])
    exposed = busy - computing
    return {
        "span_ms": _ms(span),
        "exposed_ms": _ms(exposed),
        "hidden_ms": _ms(communicating - exposed),
        "idle_ms": _ms(span - busy),
        "share": round(exposed / span, 4),
        "kinds_ms": {name: _ms(value) for name, value in kinds.most_common()},
        "longest_ms": {name: _ms(value) for name, value in names.most_common(8)},
    }


def traced(call: Callable[[], object], device: torch.device, ready: Callable[[], None]) -> dict[str, Any]:
    """`summary` of one call; On a CPU: of torch's ops.

    `ready` is called between the profiler's start and the call; its one collective does not count.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        ready()
        if cuda:
            torch.cuda.synchronize()
        call()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op", "user_annotation")
    found = sorted((e for e in events if e.get("cat") in wanted and "dur" in e), key=lambda e: e["ts"])
    first = next((i for i, event in enumerate(found) if kind(event["name"]) == "communication"), -1)
    return summary(found[first + 1 :])


def _ms(microseconds: float) -> float:
    return round(microseconds / 1e3, 3)
