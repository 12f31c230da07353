"""The part `images` of `bench_parallel.py`: one step of FLUX.1-dev and of Qwen-Image (guided), by layout.

Weights are those of `scripts/denoise/<family>.py`, made on each device from one seed, so that all ranks have the same.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import denoise
from parallel_plan import Case
from parallel_ranks import World

from safelight.configs.families import FAMILIES
from safelight.configs.parallel_costs import H200, predict
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.traffic import StepShape, step_traffic
from safelight.entrypoints.plan import find_model, step_shape
from safelight.runtime.pipelines.ahead import ROWS
from safelight.runtime.pipelines.forward_graphs import forward_graphs
from safelight.runtime.pipelines.protocol import DenoiseState

IMAGE_MODELS = {"FLUX.1-dev": "flux", "Qwen-Image": "qwen"}  # and their modules in scripts/denoise
IMAGE_SIZES = ("1024", "2048")
TINY_SIDE = 96


def step_of(model: str, side: int) -> tuple[StepShape, float]:
    """What the cost model needs of one step, and its TFLOP (of the published model)."""
    spec = find_model(model)
    params = SamplingParams(height=side, width=side).merged_over(spec.defaults)
    return step_shape(spec, params), FAMILIES[spec.family].profile(spec, params).phases[0].step_cost


def images(world: World, case: Case) -> dict[str, Any]:
    """One step of the pipeline. One rank: every rank alone, and the fastest counts; then `from_alone_l2` is how far the
    layout's prediction is from that of the rank alone, on the rank where it is farthest."""
    settings, degrees = world.settings, case.degrees
    side = TINY_SIDE if settings.tiny else int(case.size)
    shape, tflop = step_of(case.model, side)
    if degrees.cfg > shape.branches:
        return {"skipped": f"{case.model} makes one prediction a step; there is nothing to split"}
    bench = world.keep(f"{case.model} {side}", lambda: _bench(world, case, side))
    bench.mesh = world.mesh(degrees)
    bench.generator.manual_seed(1)  # the same inputs for all layouts
    world.forget_peak()
    without, state = bench.steps(world.kernels)
    pipeline = dataclasses.replace(without, graphs=forward_graphs(world.device))

    def one_step() -> DenoiseState:
        (following,) = pipeline.step([state])
        return following

    across = min if degrees.world_size == 1 else max
    without.step([state])
    denoise.make_ahead(without, state)
    world.wait()
    ahead = world.median(lambda: denoise.make_ahead(without, state), across)["ms"] / ROWS
    alone = world.median(lambda: without.step([state]), across)
    for _ in range(2):  # the second is recorded
        one_step()
    world.wait()
    figures = world.median(one_step, across)
    velocity = one_step().sampler.velocity
    if degrees.world_size == 1:
        bench.velocity = velocity
    difference = float((velocity - bench.velocity).norm() / bench.velocity.norm())
    sent = [step_traffic(shape, degrees, rank).total for rank in range(degrees.world_size)]
    return {
        **figures,
        "ms": round(figures["ms"] + ahead, 3),
        "of_it_ahead_ms": round(ahead, 3),
        "from_alone_l2": max(world.peers.exchange(difference)),
        "no_graph_ms": round(alone["ms"] + ahead, 3),
        "window": bench.mesh.window is not None,
        "tokens": bench.tokens,
        "predicted_ms": round(predict(shape, tflop, degrees, H200).seconds * 1e3, 1),
        "sent_mb": round(max(sent) / 1e6, 2),
        "memory_gib": round(world.peak_bytes() / 2**30, 1),
        "trace": world.trace(one_step),
    }


def _bench(world: World, case: Case, side: int) -> Any:
    family = importlib.import_module(f"denoise.{IMAGE_MODELS[case.model]}")
    size = "tiny" if world.settings.tiny else "full"
    return family.Bench(Path(), size, world.device, 1, side, side)
