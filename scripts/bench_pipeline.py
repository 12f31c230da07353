#!/usr/bin/env python3
"""Loads a checkpoint with the runtime's own loader and makes outputs in this process; one JSON line.

    scripts/bench_pipeline.py --model-path DIR [--sizes 1024x1024 1040x784] [--steps N] [--frames N] [--out DIR]

Figures: seconds and peak device memory of loading (bytes beyond the weights are what loading itself needed), and for
every size the milliseconds of encoding, of one step (median of all but the first, device events), of decoding, the
peak of memory, and whether the frames are of the size asked for. --out keeps the last frame of each size as PNG.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from checkout import commit
from PIL import Image

from safelight.configs.families import identify
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.jobs import check_jobs, requests
from safelight.runtime.inputs import InputStore
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import Pipeline


class Clock:
    """Milliseconds of calls on a device, and its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def ms(self, call: Callable[[], Any]) -> tuple[Any, float]:
        self.wait()
        started = time.perf_counter()
        made = call()
        self.wait()
        return made, round((time.perf_counter() - started) * 1e3, 2)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak_gb(self) -> float | None:
        """Since the last call; None where the platform does not measure it."""
        if not self.cuda:
            return None
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)


def one_size(pipeline: Pipeline, spec: Any, size: str, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Makes one output and says what each stage took."""
    width, height = map(int, size.split("x"))
    params = SamplingParams(
        prompt=args.prompt, width=width, height=height, num_frames=args.frames, num_inference_steps=args.steps, seed=1
    )
    (job,) = check_jobs(spec, [("", params)], GenerateArgs())
    with tempfile.TemporaryDirectory() as folder:
        (request,) = requests(spec, [job], InputStore(Path(folder)))
    conditioning, encode_ms = clock.ms(lambda: pipeline.encode(request))
    state = pipeline.prepare(request, conditioning, 0)
    steps = []
    for _ in range(request.num_inference_steps):
        (state,), ms = clock.ms(lambda state=state: pipeline.step([state]))
        steps.append(ms)
    shapes, decode_ms, cursor, started = [], 0.0, None, False
    while not started or cursor is not None:
        (chunk, cursor), ms = clock.ms(lambda c=cursor: pipeline.decode(state, c))
        decode_ms, started = decode_ms + ms, True
        shapes.append(tuple(chunk.frames.shape))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chunk.frames[-1].cpu().numpy()).save(args.out / f"{size}.png")
    right = all(shape[1:] == (height, width, 3) for shape in shapes) and sum(s[0] for s in shapes) == request.num_frames
    return {
        "encode_ms": encode_ms,
        "first_step_ms": steps[0],
        "step_ms": round(statistics.median(steps[1:] or steps), 2),
        "decode_ms": round(decode_ms, 2),
        "peak_gb": clock.peak_gb(),
        "size_is_right": right,
        "finite": bool(torch.isfinite(state.latents).all()),
    }


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    clock = Clock(device)
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    spec = identify(args.model_path)
    options = LoadOptions(device, dtype, dtype, None, ParallelMesh.single())
    pipeline, ms = clock.ms(lambda: load_pipeline(args.model_path, options))
    weights = pipeline.weights_bytes() / 1e9
    report = {"family": spec.family, "load_s": round(ms / 1e3, 2), "weights_gb": round(weights, 2)}
    peak = clock.peak_gb()
    report |= {} if peak is None else {"load_peak_gb": peak, "beyond_weights_gb": round(peak - weights, 2)}
    one_size(pipeline, spec, args.sizes[0], args, clock)  # warms up
    return report | {"sizes": {size: one_size(pipeline, spec, size, args, clock) for size in args.sizes}}


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a checkpoint and make outputs, with times and memory.")
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["1024x1024", "1040x784"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--prompt", default="a red apple on a blue table, morning light")
    parser.add_argument("--out", type=Path, help="folder for one PNG of each size")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        measured = measure(args, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    said = {"model_path": str(args.model_path), "steps": args.steps, "frames": args.frames}
    line = {"commit": commit(), "device": name, "torch": torch.__version__, **said}
    print(json.dumps(line | measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
