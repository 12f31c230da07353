#!/usr/bin/env python
"""Every parallel layout of the GPUs of one machine against one of them, in one run, with random weights.

    PYTHONPATH=src python scripts/bench_parallel.py [--budget-s 300]            # all GPUs, NCCL
    PYTHONPATH=src python scripts/bench_parallel.py --device cpu --tiny         # the same on gloo, in seconds
    PYTHONPATH=src python scripts/bench_parallel.py --predict                   # the table of docs/parallelism.md

Parts: `check` (layouts against one GPU), `links` (the collectives alone), `step` (a guided step of Wan by model and
size, milliseconds, what it sends, and where its time goes by the profiler), `diffusers` (its context parallelism),
`vae` (decoding shared), and, when asked for, `images` (a step of FLUX.1-dev and Qwen-Image at 1024 and 2048). One JSON
line a case as soon as it is known, a Markdown table at the end. A case that fails is reported with its error, and the
others go on; past the budget nothing starts, and what runs is ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from checkout import commit
from parallel_plan import Case, Settings, run_rank

from safelight.configs.parallel import Degrees, WantedDegrees, choose_degrees
from safelight.configs.parallel_costs import H200, predict

PARTS = ("check", "links", "step", "diffusers", "vae")  # and "images", when it is asked for
IMAGE_MODELS, IMAGE_SIZES = ("FLUX.1-dev", "Qwen-Image"), ("1024", "2048")
GPUS = (1, 2, 4, 8, 16, 32, 64)
START_S = 120.0  # until the ranks of a new world say hello


def predicted() -> None:
    """A Markdown table: seconds per guided step and efficiency, by model, size and number of GPUs."""
    from parallel_models import MODELS, SIZES, step_numbers

    print("| model | " + " | ".join(str(n) for n in GPUS) + " |")
    print("|---" * (len(GPUS) + 1) + "|")
    for model, size in itertools.product(MODELS, [size for size in SIZES if size != "tiny"]):
        shape, cost = step_numbers(model, size, 81, tiny=False)
        one, cells = predict(shape, cost, Degrees(), H200), []
        for count in GPUS:
            degrees = choose_degrees(WantedDegrees(count, count), shape.heads, guided=True)
            step = predict(shape, cost, degrees, H200)
            cells.append(f"{step.seconds:.3f} s, {step.efficiency(one, count):.0%} ({short(degrees)})")
        print(f"| {model} {size} | " + " | ".join(cells) + " |")


def short(degrees: Degrees) -> str:
    return f"{degrees.cfg}x{degrees.ring}x{degrees.ulysses}"


def layouts_of(ranks: int) -> list[str]:
    """Every layout of so many ranks, the one that would be chosen first."""
    wanted = WantedDegrees(ranks, ranks)
    chosen = choose_degrees(wanted, 12, guided=True)
    return [short(d) for d in sorted(wanted.layouts(), key=lambda d: d != chosen)]


def cases_of(args: argparse.Namespace, ranks: int) -> list[Case]:
    """What to measure, by importance; the dearest steps last."""
    layouts = args.layouts or layouts_of(ranks)
    steps = {
        (model, size): [Case("step", model, size, layout) for layout in ["1x1x1", *layouts]]
        for size in args.sizes
        for model in args.models
    }
    first, *middle, last = [*steps.values(), []] if len(steps) == 1 else steps.values()
    theirs = ("1x1x1", f"1x1x{ranks}", f"1x{ranks}x1")
    ordered = [
        Case("check", layout=",".join(layouts_of(ranks))),
        *first,
        Case("links"),
        *itertools.chain(*middle),
        Case("vae"),
        *[Case("diffusers", args.models[0], args.sizes[0], layout) for layout in theirs],
        *last,
        *[
            Case("images", model, size, layout)
            for model in IMAGE_MODELS
            for size in (IMAGE_SIZES[:1] if args.tiny else IMAGE_SIZES)
            for layout in ["1x1x1", *layouts]
        ],
    ]
    return [case for case in ordered if case.part in args.parts]


class Report:
    """Prints results as they come, and keeps them for the table."""

    def __init__(self, ranks: int) -> None:
        self.facts: dict[str, Any] = {"commit": commit(), "gpus": ranks}
        self.results: list[tuple[Case, dict[str, Any]]] = []
        self.alone: dict[tuple[str, str, str], float] = {}

    def add(self, case: Case, result: dict[str, Any]) -> None:
        if case.layout == "1x1x1" and "ms" in result:
            self.alone[case.part, case.model, case.size] = result["ms"]
        alone = self.alone.get((case.part, case.model, case.size))
        if alone and "ms" in result:
            result["speedup"] = round(alone / result["ms"], 3)
            result["efficiency"] = round(alone / result["ms"] / case.degrees.world_size, 4)
        self.results.append((case, result))
        named = {name: getattr(case, name) for name in ("part", "model", "size", "layout") if getattr(case, name)}
        print(json.dumps({**self.facts, **named, **result}), flush=True)

    def table(self) -> None:
        print(f"\n{self.facts}\n")
        print(
            "| | model | size | cfg x ring x ulysses | ms a step | speed-up | efficiency | exposed | hidden | MB sent |"
        )
        print("|---" * 10 + "|")
        for case, result in self.results:
            if case.part not in ("step", "images", "diffusers"):
                continue
            name = "diffusers" if case.part == "diffusers" else "ours"
            cells = [name, case.model, case.size, case.layout]
            if "ms" in result:
                trace = result.get("trace", {})
                span = trace.get("span_ms")
                shares = [f"{trace[k] / span:.1%}" if span else "" for k in ("exposed_ms", "hidden_ms")]
                relative = (
                    [f"{result['speedup']:.2f}", f"{result['efficiency']:.1%}"] if "speedup" in result else ["", ""]
                )
                cells += [f"{result['ms']:.1f}", *relative, *shares, f"{result.get('sent_mb', '')}"]
            else:
                cells += [str(result.get("error") or result.get("skipped"))[:80].replace("|", "/"), *[""] * 5]
            print("| " + " | ".join(cells) + " |")


def run_group(cases: list[tuple[int, Case]], ranks: int, settings: Settings, report: Report) -> list[tuple[int, Case]]:
    """Starts the ranks, which run the cases in order, and reports what comes; returns the cases that are left when the
    ranks ended before them. At least the first is done or given up."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    left, running = dict(cases), None
    with tempfile.TemporaryDirectory() as folder:
        started: list[BaseProcess] = [
            context.Process(target=run_rank, args=(rank, ranks, folder, cases, settings, sender))
            for rank in range(ranks)
        ]
        for process in started:
            process.start()
        sender.close()
        limit, why = min(time.time() + START_S, settings.until), None
        try:
            while left and why is None:
                ready = connection.wait([receiver, *(p.sentinel for p in started)], max(0.0, limit - time.time()))
                if receiver in ready:
                    try:
                        number, value = receiver.recv()
                    except EOFError:
                        why = "a rank ended"
                        continue
                    if number is None:
                        report.facts |= value
                    elif value is None:
                        running = number
                    else:
                        report.add(left.pop(number), value)
                        running = None
                    limit = min(time.time() + settings.case_s, settings.until)
                elif not ready:
                    why = "the budget is spent" if time.time() >= settings.until else "took too long"
                else:
                    why = f"a rank ended, exit codes {[p.exitcode for p in started]}"
        finally:
            for process in started:
                if not left and why is None:
                    process.join(10)
                process.kill()
                process.join()
    if why is not None:
        number = next(iter(left)) if running is None and len(left) == len(cases) else running
        if number is not None:
            report.add(left.pop(number), {"error": why})
    return list(left.items())


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure every parallel layout of this machine's GPUs.")
    parser.add_argument("--predict", action="store_true", help="print the cost model's table instead")
    parser.add_argument("--ranks", type=int, help="default: every GPU; on a CPU two")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and pictures")
    parser.add_argument("--parts", type=names, default=list(PARTS), help=f"of {','.join(PARTS)},images")
    parser.add_argument("--models", type=names, default=["1.3B", "14B"])
    parser.add_argument("--sizes", type=names, default=["480p", "720p"])
    parser.add_argument("--layouts", type=names, help="cfg x ring x ulysses, as 2x1x1,1x1x2; default: all")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--vae-frames", type=int, default=17)
    parser.add_argument("--reps", type=int, default=5, help="the most steps that a case measures")
    parser.add_argument("--reps-s", type=float, default=4.0, help="start no further step that ends after so long")
    parser.add_argument("--transport", choices=["auto", "nccl"], default="auto", help="of Ulysses")
    parser.add_argument("--case-s", type=float, default=75.0, help="end a case that takes longer")
    parser.add_argument("--budget-s", type=float, default=300.0, help="end everything after so long")
    args = parser.parse_args()
    if args.predict:
        predicted()
        return 0
    until = time.time() + args.budget_s
    ranks = args.ranks or _devices(args.device)
    if args.tiny:
        args.models, args.sizes, args.frames, args.vae_frames = args.models[:1], ["tiny"], 5, 5
    settings = Settings(
        args.device, args.tiny, args.frames, args.vae_frames, args.reps, args.reps_s, args.case_s, until, args.transport
    )
    left, report = list(enumerate(cases_of(args, ranks))), Report(ranks)
    while left and time.time() < until:
        left = run_group(left, ranks, settings, report)
    for _, case in left:
        report.add(case, {"skipped": "the budget is spent"})
    report.table()
    return int(any("error" in result or result.get("ok") is False for _, result in report.results))


def _devices(device: str) -> int:
    import torch

    return torch.cuda.device_count() if device == "cuda" else 2


if __name__ == "__main__":
    sys.exit(main())
