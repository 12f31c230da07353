#!/usr/bin/env python3
"""Times one forward of a family's transformer, ours beside diffusers', in one run with random weights.

    scripts/bench_denoise.py [--family wan|flux] [--size NAME] [--frames N] [--height N] [--width N] [--rounds 12]

Prints one JSON line: median milliseconds of every variant (interleaved rounds, device events, fresh random inputs each
time), the relative L2 distance of each from a float32 forward at five timesteps, and for our pipeline's steps the time
in which the GPU did nothing. A variant that fails is reported with its error; the others are measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pkgutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import denoise
import torch
from checkout import commit
from torch import Tensor

from safelight.kernels.dispatch import reference_kernels, triton_kernels
from safelight.runtime.pipelines.ahead import ROWS
from safelight.runtime.pipelines.forward_graphs import CudaRecorder, ForwardGraphs, forward_graphs

Forward = Callable[..., Tensor]  # a sample of the family's -> prediction
VARIANTS = (
    "diffusers", "diffusers_compiled", "ours_reference", "ours_compiled", "ours_triton", "ours_triton_compiled",
    "ours_graph",
)  # fmt: skip
TIMESTEPS = (1.0, 250.0, 500.0, 750.0, 999.0)
FAMILIES = sorted(module.name for module in pkgutil.iter_modules(denoise.__path__))


def variants(bench: Any) -> dict[str, Callable[[], Forward]]:
    """Everything that is measured, made one after the other."""
    made: dict[str, Callable[[], Forward]] = {
        "diffusers": lambda: bench.theirs(torch.bfloat16, False),
        "diffusers_compiled": lambda: bench.theirs(torch.bfloat16, True),
        "ours_reference": lambda: bench.ours(reference_kernels(), False),
        "ours_compiled": lambda: bench.ours(reference_kernels(), True),
    }
    if bench.device.type == "cuda":
        made["ours_triton"] = lambda: bench.ours(triton_kernels(), False)
        made["ours_triton_compiled"] = lambda: bench.ours(triton_kernels(), True)
        made["ours_graph"] = lambda: recorded(bench.ours(triton_kernels(), False), bench.device)
    return made


def recorded(forward: Forward, device: torch.device) -> Forward:
    """The forward as a CUDA graph, of any size."""
    graphs = ForwardGraphs(CudaRecorder(device))
    return lambda *sample: graphs(forward, *sample, needs=lambda: 0)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


class BrokenDevice(Exception):
    """A variant (the first argument) after which the device has to be taken anew."""


def prepare(made: dict[str, Callable[[], Forward]], bench: Any, errors: dict[str, str]) -> dict[str, Forward]:
    """Builds and warms up every variant; what fails goes to `errors`."""
    ready: dict[str, Forward] = {}
    for name, build in made.items():
        start = time.perf_counter()
        try:
            forward = build()
            for _ in range(3):  # a graph is recorded in the second
                forward(*bench.draw())
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            ready[name] = forward
        except torch.AcceleratorError as error:  # the device takes no more work of this process
            raise BrokenDevice(name, str(error)[:200]) from error
        except Exception as error:  # a failing variant must not lose the others' figures
            errors[name] = f"{type(error).__name__}: {error}"[:600]
        print(f"{name}: ready after {time.perf_counter() - start:.1f} s {errors.get(name, '')}", file=sys.stderr)
    return ready


Samples = list[tuple[Tensor, ...]]


def distances(forwards: dict[str, Forward], samples: Samples, truths: list[Tensor]) -> dict[str, list[float]]:
    """Relative L2 distance from the float32 forward, per timestep."""
    found: dict[str, list[float]] = {name: [] for name in forwards}
    for sample, truth in zip(samples, truths, strict=True):
        for name, forward in forwards.items():
            distance = (forward(*sample).float() - truth).norm() / truth.norm()
            found[name].append(round(distance.item(), 6))
    return found


def pipeline_steps(bench: Any, steps: int) -> dict[str, float]:
    """Our pipeline's steps as a server runs them: milliseconds each, and how long the GPU idled in them (profiler)."""
    pipeline, state = bench.steps(triton_kernels() if bench.device.type == "cuda" else reference_kernels())
    pipeline = dataclasses.replace(pipeline, graphs=forward_graphs(bench.device))

    def run() -> None:
        current = state
        for _ in range(steps):
            (current,) = pipeline.step([current])

    run()
    denoise.make_ahead(pipeline, state)
    ahead = timed(lambda: denoise.make_ahead(pipeline, state), bench.device) / ROWS
    figures = {"ms": round(timed(run, bench.device) / steps + ahead, 2), "of_it_ahead_ms": round(ahead, 3)}
    if bench.device.type == "cuda":
        figures |= idle(run, steps)
    return figures


def idle(call: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds per step in which no kernel or copy ran, and the longest such gap in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    busy = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    gaps, reached = [], busy[0][1]
    for start, end in busy:
        if start > reached:
            gaps.append(start - reached)
        reached = max(reached, end)
    return {"gpu_idle_ms": round(sum(gaps) / 1e3 / steps, 3), "longest_gap_us": round(max(gaps, default=0.0), 1)}


def forget(forwards: dict[str, Forward]) -> None:
    """Gives their memory back."""
    forwards.clear()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def truths_of(bench: Any, samples: list[Any], errors: dict[str, str]) -> list[Tensor]:
    """What float32 predicts; nothing for a model that does not fit in float32."""
    exact: dict[str, Forward] = {}
    try:
        exact["exact"] = bench.theirs(torch.float32, False)
        return [exact["exact"](*sample).float() for sample in samples]
    except torch.cuda.OutOfMemoryError as error:
        errors["exact"] = str(error)[:200]
        return []
    finally:
        forget(exact)


def measure(args: argparse.Namespace, bench: Any) -> dict[str, Any]:
    errors: dict[str, str] = {}
    made = variants(bench)
    chosen = {name: made[name] for name in made if not args.only or name in args.only.split(",")}
    samples = [bench.draw(timestep, small=True) for timestep in TIMESTEPS]
    truths = truths_of(bench, samples, errors)
    times: dict[str, list[float]] = {name: [] for name in chosen}
    forwards = prepare(chosen, bench, errors)
    for _ in range(args.rounds):
        for name, forward in forwards.items():
            sample = bench.draw()
            times[name].append(timed(lambda f=forward, s=sample: f(*s), bench.device))  # type: ignore[misc]
    print(json.dumps({n: round(statistics.median(v), 2) for n, v in times.items() if v}), file=sys.stderr)
    measured = {name: values for name, values in times.items() if values}
    report: dict[str, Any] = {
        "forward_ms": {name: round(statistics.median(values), 2) for name, values in measured.items()},
        "forward_ms_range": {n: [round(min(values), 2), round(max(values), 2)] for n, values in measured.items()},
    }
    try:
        eager = {name: forward for name, forward in forwards.items() if "compiled" not in name or args.accuracy_all}
        report["relative_l2"] = distances(eager, samples, truths) if truths else {}
        report["pipeline_step"] = pipeline_steps(bench, args.steps)
    except Exception as error:  # keep the times when a later part fails
        errors["later"] = f"{type(error).__name__}: {error}"[:600]
    return {"tokens": bench.tokens, **report, "errors": errors}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time one transformer forward beside diffusers.")
    parser.add_argument("--family", default="wan", choices=FAMILIES)
    parser.add_argument("--size", help="of the checkpoint; default: the published one")
    for name in ("frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, help="default: the model's")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="pipeline steps to time")
    parser.add_argument("--only", help="comma-separated variants; default: all")
    parser.add_argument(
        "--failed", default="", help="of variants that broke the device (the script starts itself again)"
    )
    parser.add_argument(
        "--accuracy-all", action="store_true", help="distances of compiled variants too (compiles again)"
    )
    args = parser.parse_args()
    family = importlib.import_module(f"denoise.{args.family}")
    args.size = args.size or family.SIZES[0]
    if args.size not in family.SIZES:
        parser.error(f"--size: one of {', '.join(family.SIZES)} expected, got {args.size!r}")
    for name, value in family.DEFAULTS.items():
        setattr(args, name, getattr(args, name) or value)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
            root = Path(temporary)
            measured = measure(args, family.Bench(root, args.size, device, args.frames, args.height, args.width))
    except BrokenDevice as broken:
        name, why = broken.args
        left = [n for n in (args.only or ",".join(VARIANTS)).split(",") if n != name]
        again = [*sys.argv, "--only", ",".join(left), "--failed", f"{args.failed};{name}: {why}".lstrip(";")]
        os.execv(sys.executable, [sys.executable, *again])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"commit": commit(), "device": name, "torch": torch.__version__, **vars(args), **measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
