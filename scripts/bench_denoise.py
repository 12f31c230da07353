#!/usr/bin/env python3
"""Times one forward of the Wan 2.1 1.3B transformer, ours beside diffusers', in one run with random weights.

    scripts/bench_denoise.py [--size 1.3b|tiny] [--frames 81] [--height 480] [--width 832] [--rounds 12]

Prints one JSON line: median milliseconds of every variant (interleaved rounds, device events, fresh random inputs each
time), the relative L2 distance of each from a float32 forward at five timesteps, and for our pipeline's guided steps
the time in which the GPU did nothing. A variant that fails is reported with its error; the others are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import make
from torch import Tensor

from safelight.configs.sampling_params import SamplingParams
from safelight.kernels.dispatch import KernelSet, reference_kernels, triton_kernels
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json
from safelight.runtime.models.wan.pipeline import WanConditioning, WanPipeline
from safelight.runtime.models.wan.transformer import WanConfig, WanText, WanTransformer
from safelight.runtime.models.wan.weights import name_map, parameter_dtype
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState, SamplerState
from safelight.runtime.samplers import make_sampler, read_config

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]  # latents, timestep, text -> prediction
TIMESTEPS = (1.0, 250.0, 500.0, 750.0, 999.0)


def ours(folder: Path, device: torch.device, kernels: KernelSet, compiled: bool) -> WanTransformer:
    """Our transformer with a given kernel set (the runtime's own choice is `load_transformer`)."""
    config = WanConfig.from_json(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = WanTransformer(config, ParallelMesh.single(), kernels)
    load_weights(
        model, checkpoint_files(folder), name_map(config), device,
        lambda name: parameter_dtype(name, torch.bfloat16),
    )  # fmt: skip
    if compiled:
        model.compile_blocks()
    return model.eval()


def theirs(folder: Path, device: torch.device, dtype: torch.dtype, compiled: bool) -> Forward:
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).to(device).eval()
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
    return lambda latents, timestep, text: model(latents.to(dtype), timestep, text.to(dtype), return_dict=False)[0]


def as_forward(model: WanTransformer) -> Forward:
    return lambda latents, timestep, text: model(latents, timestep, WanText(text))


def variants(folder: Path, device: torch.device) -> dict[str, Callable[[], Forward]]:
    """Everything that is measured, made one after the other."""
    made: dict[str, Callable[[], Forward]] = {
        "diffusers": lambda: theirs(folder, device, torch.bfloat16, False),
        "diffusers_compiled": lambda: theirs(folder, device, torch.bfloat16, True),
        "ours_reference": lambda: as_forward(ours(folder, device, reference_kernels(), False)),
        "ours_compiled": lambda: as_forward(ours(folder, device, reference_kernels(), True)),
    }
    if device.type == "cuda":
        made["ours_triton"] = lambda: as_forward(ours(folder, device, triton_kernels(), False))
        made["ours_triton_compiled"] = lambda: as_forward(ours(folder, device, triton_kernels(), True))
    return made


class Inputs:
    """Fresh random inputs of one latent shape."""

    def __init__(self, shape: tuple[int, ...], text_dim: int, device: torch.device) -> None:
        self.shape, self.text_dim, self.device = shape, text_dim, device
        self.generator = torch.Generator(device).manual_seed(0)

    def draw(self, timestep: float = 500.0) -> tuple[Tensor, Tensor, Tensor]:
        latents = torch.randn(1, *self.shape, generator=self.generator, device=self.device)
        text = torch.randn(1, 512, self.text_dim, generator=self.generator, device=self.device)
        text[:, 100:] = 0
        return latents, torch.full((1,), timestep, device=self.device), text


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


def prepare(made: dict[str, Callable[[], Forward]], inputs: Inputs, errors: dict[str, str]) -> dict[str, Forward]:
    """Builds and warms up every variant; what fails goes to `errors`."""
    ready: dict[str, Forward] = {}
    for name, build in made.items():
        start = time.perf_counter()
        try:
            forward = build()
            for _ in range(2):
                forward(*inputs.draw())
            if inputs.device.type == "cuda":
                torch.cuda.synchronize()
            ready[name] = forward
        except Exception as error:  # a failing variant must not lose the others' figures
            errors[name] = f"{type(error).__name__}: {error}"[:600]
        print(f"{name}: ready after {time.perf_counter() - start:.1f} s {errors.get(name, '')}", file=sys.stderr)
    return ready


def distances(forwards: dict[str, Forward], exact: Forward, inputs: Inputs) -> dict[str, list[float]]:
    """Relative L2 distance from the float32 forward, per timestep."""
    found: dict[str, list[float]] = {name: [] for name in forwards}
    for timestep in TIMESTEPS:
        sample = inputs.draw(timestep)
        truth = exact(*sample).float()
        for name, forward in forwards.items():
            distance = (forward(*sample).float() - truth).norm() / truth.norm()
            found[name].append(round(distance.item(), 6))
    return found


def guided_steps(model: WanTransformer, root: Path, inputs: Inputs, steps: int) -> dict[str, float]:
    """Our pipeline's steps with guidance: milliseconds each, and how long the GPU idled in them (profiler)."""
    flow = read_config(read_json(root / "scheduler" / "scheduler_config.json"))
    pipeline = WanPipeline(Any, inputs.device, ParallelMesh.single(), flow, model, Any, Any)  # type: ignore[arg-type]
    params = SamplingParams(height=480, width=832, num_frames=81, num_inference_steps=50, guidance_scale=5.0)
    request = GenerationRequest(
        "", "", {}, params.height or 0, params.width or 0, params.num_frames or 0, 16, 50, 5.0, 0, 1, "unipc",
        MediaSpec(MediaFormat.MP4),
    )  # fmt: skip
    latents, _, text = inputs.draw()
    conditioning = WanConditioning(text[0].to(model.dtype), text[0].flip(0).to(model.dtype))
    sigmas = make_sampler("unipc", flow).schedule(50).sigmas
    state = DenoiseState(
        latents[0], 0, sigmas, SamplerState(), torch.Generator().get_state(), 5.0, conditioning, request, 0
    )

    def run() -> None:
        current = state
        for _ in range(steps):
            (current,) = pipeline.step([current])

    run()
    figures = {"ms": round(timed(run, inputs.device) / steps, 2)}
    if inputs.device.type == "cuda":
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


def commit() -> str:
    """The checkout's commit, or "unknown" outside git."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def measure(args: argparse.Namespace, root: Path, device: torch.device) -> dict[str, Any]:
    folder = root / "transformer"
    config = WanConfig.from_json(read_json(folder / "config.json"))
    shape = (config.in_channels, (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    small = Inputs((config.in_channels, min(3, shape[1]), 30, 52), config.text_dim, device)
    full, errors = Inputs(shape, config.text_dim, device), {}
    made = variants(folder, device)
    chosen = {name: made[name] for name in made if not args.only or name in args.only.split(",")}
    forwards = prepare(chosen, full, errors)
    times: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(args.rounds):
        for name, forward in forwards.items():
            sample = full.draw()
            times[name].append(timed(lambda f=forward, s=sample: f(*s), device))  # type: ignore[misc]
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    spread = {name: [round(min(values), 2), round(max(values), 2)] for name, values in times.items()}
    print(json.dumps({"forward_ms": medians, "forward_ms_range": spread}), file=sys.stderr)
    report: dict[str, Any] = {"forward_ms": medians, "forward_ms_range": spread}
    try:
        eager = {name: forward for name, forward in forwards.items() if "compiled" not in name or args.accuracy_all}
        report["relative_l2"] = distances(eager, theirs(folder, device, torch.float32, False), small)
        kernels = triton_kernels() if device.type == "cuda" else reference_kernels()
        model = ours(folder, device, kernels, compiled=False)
        report["guided_step"] = guided_steps(model, root, full, args.steps)
    except Exception as error:  # keep the times when a later part fails
        errors["later"] = f"{type(error).__name__}: {error}"[:600]
    return {"tokens": shape[1] * shape[2] * shape[3] // 4, **report, "errors": errors}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time one Wan transformer forward beside diffusers.")
    parser.add_argument("--size", default="1.3b", choices=["1.3b", "tiny"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="guided pipeline steps to time")
    parser.add_argument("--only", help="comma-separated variants; default: all")
    parser.add_argument(
        "--accuracy-all", action="store_true", help="distances of compiled variants too (compiles again)"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        root = Path(temporary)
        make("wan2.1-t2v", root, args.size, components=("transformer", "scheduler"), device=device)
        measured = measure(args, root, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"commit": commit(), "device": name, "torch": torch.__version__, **vars(args), **measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
