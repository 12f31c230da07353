#!/usr/bin/env python
"""Ulysses, ring and cfg layouts: bytes that a step sends, milliseconds of a step, and what the cost model predicts.

    PYTHONPATH=src python scripts/bench_parallel.py [--ranks 4] [--steps 3]     # measured on gloo processes
    PYTHONPATH=src python scripts/bench_parallel.py --predict                   # the table of docs/parallelism.md

Measured: a small Wan transformer on the CPU, one thread a rank. Bytes are those of `configs/traffic.py`, which
tests/distributed holds to what is really sent; milliseconds of ranks that share cores say little about GPUs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from typing import Any

from safelight.configs.families import FAMILIES
from safelight.configs.parallel import Degrees, WantedDegrees, choose_degrees
from safelight.configs.parallel_costs import H200, predict
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.traffic import StepShape, step_traffic
from safelight.entrypoints.plan import find_model

MODELS = ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B")
SIZES = {"480p": (480, 832), "720p": (720, 1280)}
GPUS = (1, 2, 4, 8, 16, 32, 64)
SMALL = StepShape(tokens=1280, heads=12, head_dim=32, layers=4, prediction_channels=64, item_bytes=4)
GRID = (5, 32, 32)  # latent frames, rows and columns of SMALL


def predicted() -> None:
    """A Markdown table: seconds per guided step and efficiency, by model, size and number of GPUs."""
    print("| model | " + " | ".join(str(n) for n in GPUS) + " |")
    print("|---" * (len(GPUS) + 1) + "|")
    for name in MODELS:
        for size, (height, width) in SIZES.items():
            spec = find_model(name)
            profile = FAMILIES[spec.family].profile(
                spec, SamplingParams(height=height, width=width).merged_over(spec.defaults)
            )
            heads = int(spec.transformer["num_attention_heads"])
            shape = StepShape(profile.tokens, heads, 128, int(spec.transformer["num_layers"]), 64)
            cells, cost = [], profile.phases[0].step_cost
            one = predict(shape, cost, Degrees(), H200)
            for count in GPUS:
                degrees = choose_degrees(WantedDegrees(count, count), heads, guided=True)
                step = predict(shape, cost, degrees, H200)
                layout = f"{degrees.cfg}x{degrees.ring}x{degrees.ulysses}"
                cells.append(f"{step.seconds:.3f} s, {step.efficiency(one, count):.0%} ({layout})")
            print(f"| {name.removeprefix('Wan2.1-T2V-')} {size} | " + " | ".join(cells) + " |")


def rank_main(rank: int, world: int, folder: str, steps: int, results: Any) -> None:
    import torch
    import torch.distributed as dist

    from safelight.kernels.dispatch import reference_kernels
    from safelight.runtime.models.wan.transformer import WanConfig, WanText, WanTransformer
    from safelight.runtime.parallel.cfg import gather_branches, own_branches
    from safelight.runtime.parallel.mesh import Axis, build_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    assert dist.group.WORLD is not None
    config = WanConfig(SMALL.heads, SMALL.head_dim, 16, 16, 64, 64, 768, SMALL.layers)
    text, timestep = WanText(torch.randn(2, 32, 64)), torch.full((2,), 500.0)
    latents = torch.randn(2, 16, *GRID)
    for degrees in WantedDegrees(world, world).layouts():
        mesh = build_mesh(dist.group.WORLD, degrees.cfg, degrees.ring, degrees.ulysses)
        model, times = WanTransformer(config, mesh, reference_kernels()), []
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        own = own_branches(mesh, 2)
        part = slice(own.start, own.stop)
        with torch.inference_mode():
            for _ in range(steps + 1):
                dist.barrier()
                start = time.perf_counter()
                made = model(latents[part], timestep[part], WanText(text.embeds[part]))
                gather_branches(made, 2, group=mesh.group(Axis.CFG))
                times.append(time.perf_counter() - start)
        if rank == 0:
            results.put((degrees, statistics.median(times[1:])))
    dist.destroy_process_group()


def measured(ranks: int, steps: int) -> None:
    context = multiprocessing.get_context("spawn")
    found: dict[Degrees, float] = {}
    for world in range(1, ranks + 1):
        results = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            started = [context.Process(target=rank_main, args=(r, world, folder, steps, results)) for r in range(world)]
            for process in started:
                process.start()
            for process in started:
                process.join()
            if any(process.exitcode for process in started):
                raise SystemExit(f"a rank of {world} failed")
        while not results.empty():
            degrees, seconds = results.get()
            found[degrees] = seconds
    alone = found[Degrees()]
    print("| cfg x ring x ulysses | ms a step | efficiency | MB sent by the rank that sends most | by all ranks |")
    print("|---|---|---|---|---|")
    for degrees, seconds in found.items():
        sent = [step_traffic(SMALL, degrees, rank).total / 1e6 for rank in range(degrees.world_size)]
        layout, efficiency = f"{degrees.cfg}x{degrees.ring}x{degrees.ulysses}", alone / degrees.world_size / seconds
        print(f"| {layout} | {seconds * 1e3:.0f} | {efficiency:.0%} | {max(sent):.2f} | {sum(sent):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes and milliseconds of each parallel layout.")
    parser.add_argument("--ranks", type=int, default=4, help="measure every layout of up to so many processes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--predict", action="store_true", help="print the cost model's table instead")
    args = parser.parse_args()
    if args.predict:
        predicted()
    else:
        measured(args.ranks, args.steps)


if __name__ == "__main__":
    main()
