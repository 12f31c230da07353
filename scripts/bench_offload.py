#!/usr/bin/env python3
"""Runs a full-size model with random weights offloaded under a memory cap, beside the same model resident.

    scripts/bench_offload.py --family wan --cap-gb 16 [--variant NAME] [--size SIZE] [--steps 3] [--frames 33] ...

Nothing is read from a checkpoint: the family's own loader runs on its configuration files, with random numbers where it
would read tensors, the same ones in both runs. Each run encodes a prompt, takes steps, and decodes. Prints one JSON
line: for both runs the bytes of weights, the peak of each phase and milliseconds per step, and for the offloaded one
the share of its copies that the computation hid, and whether latents and frames are bitwise the resident run's. A model
that does not fit without a cap has no resident figures.

`--cap-gb` is in GiB, of torch's allocator; the CUDA context, about half a GiB, comes on top.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from checkout import commit
from make_checkpoint import FAMILIES as CHECKPOINTS
from make_checkpoint import make
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.configs.families import FAMILIES, ModelSpec, identify
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.jobs import check_jobs, requests
from safelight.runtime.inputs import InputStore
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.parallel.mesh import ParallelMesh

Load = Callable[[ModelSpec, LoadOptions], Any]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
GIB = 1 << 30
SLICE_BYTES = 128 << 20  # of random numbers made at a time
VARIANTS = {"wan2.1-t2v": "Wan2.1-T2V-14B"}  # larger than the largest size that make_checkpoint builds
ALL = ("dit", "text_encoder", "image_encoder", "vae")


# --------------------------------------------------------------------------------------------------------------------
# A model without a checkpoint


def configurations(name: str, size: str, variant: str | None, root: Path) -> None:
    """Everything of a checkpoint except the weights."""
    checkpoint = CHECKPOINTS[name][size]()
    small = tuple(part for part, component in checkpoint.components.items() if not component.weights)
    make(name, root, size, components=small)
    for part, component in checkpoint.components.items():
        if component.weights:
            with torch.device("meta"):
                built = component.build()
            config = built if hasattr(built, "to_json_string") else built.config  # of diffusers, of transformers
            (root / part).mkdir(exist_ok=True)
            (root / part / "config.json").write_text(config.to_json_string(), encoding="utf-8")
            save_file({"none": torch.zeros(1)}, root / part / "none.safetensors")
    if variant is not None:
        published = {v.name: v.configs for family in FAMILIES.values() for v in family.variants}[variant]
        path = root / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | dict(published["transformer"])))


def random_weights(
    module: nn.Module,
    files: object,
    names: object,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
    ignored: object = None,
    parts: object = None,
    homes: Mapping[str, torch.device] = MappingProxyType({}),
) -> None:
    """In the place of `load_weights`: a parameter's numbers depend on its name only, and are made on the device in
    slices, wherever the parameter lives."""
    for name, parameter in list(module.named_parameters()):
        home = next((d for prefix, d in homes.items() if name.startswith(f"{prefix}.")), device)
        made = torch.empty(parameter.shape, dtype=dtype_of(name), device=home)
        _fill(name, made)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(made, requires_grad=False))
    for child in module.modules():
        for name, buffer in list(child.named_buffers(recurse=False)):
            setattr(child, name, buffer.to(device))


def _fill(name: str, made: Tensor) -> None:
    """Matrices by their fan-in, norms near one, biases small."""
    generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
    norm = ("norm" in name or name.endswith("gamma")) and not name.endswith("bias")
    scale = 0.1 if norm else 0.05 if made.ndim < 2 else made[0].numel() ** -0.5
    flat = made.view(-1)
    step = SLICE_BYTES // made.element_size()
    for start in range(0, flat.numel(), step):
        rows = flat[start : start + step]
        noise = torch.randn(rows.shape, generator=generator, dtype=made.dtype, device=DEVICE)
        rows.copy_(noise.mul_(scale).add_(1.0 if norm else 0.0))


def loader_without_files(spec: ModelSpec) -> Load:
    """The family's `load`, which from now on reads no weights."""
    module_name, _, attribute = FAMILIES[spec.family].pipeline.partition(":")
    load: Load = getattr(importlib.import_module(module_name), attribute)
    for name, module in list(sys.modules.items()):
        if name.startswith("safelight.runtime.models"):
            if hasattr(module, "load_weights"):
                module.load_weights = random_weights  # type: ignore[attr-defined]
            if hasattr(module, "checkpoint_files"):
                module.checkpoint_files = lambda folder, stem="": [folder / "none.safetensors"]  # type: ignore[attr-defined]
    return load


# --------------------------------------------------------------------------------------------------------------------
# One run


def gb(count: float) -> float:
    return round(count / 1e9, 3)


class Phase:
    """Milliseconds and the memory peak of a `with` block; waits for the device at both ends."""

    def __init__(self) -> None:
        self.ms = self.peak_gb = self.reserved_gb = 0.0

    def __enter__(self) -> Phase:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            self.peak_gb = gb(torch.cuda.max_memory_allocated())
            self.reserved_gb = gb(torch.cuda.max_memory_reserved())
        self.ms = round((time.perf_counter() - self._start) * 1e3, 2)


def run(
    load: Load, spec: ModelSpec, request: GenerationRequest, args: argparse.Namespace, offload: tuple[str, ...]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Figures of one load and one job, and its latents and frames on the CPU."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    options = LoadOptions(
        DEVICE, dtype, dtype, None, ParallelMesh.single(), offload=offload, pin_cpu_memory=not args.no_pin
    )
    with Phase() as loading:
        pipeline = load(spec, options)
    with Phase() as encoding:
        conditioning = pipeline.encode(request)
    state = pipeline.prepare(request, conditioning, 0)
    with Phase() as first:  # kernels are loaded, nothing is prefetched
        (state,) = pipeline.step([state])
    copied = [stream.copies for stream in options.residency.streams]
    with Phase() as stepping:
        for _ in range(args.steps):
            (state,) = pipeline.step([state])
    copies = [s.copies - before for s, before in zip(options.residency.streams, copied, strict=True)]
    frames, cursor, chunks = [], None, 0
    with Phase() as decoding:
        while chunks < args.chunks and (chunks == 0 or cursor is not None):
            chunk, cursor = pipeline.decode(state, cursor)
            frames.append(chunk.frames.cpu())
            chunks += 1
    phases = {"load": loading, "encode": encoding, "step": stepping, "decode": decoding}
    figures = {
        "weights_gb": gb(pipeline.weights_bytes()),
        "encode_extra_gb": gb(options.residency.encode_bytes),
        "load_s": round(loading.ms / 1e3, 1),
        "ms_per_step": round(stepping.ms / args.steps, 2),
        "first_step_ms": first.ms,
        "encode_ms": encoding.ms,
        "decode_ms": decoding.ms,
        "peak_gb": {name: phase.peak_gb for name, phase in phases.items()},
    }
    figures["reserved_gb"] = max(phase.reserved_gb for phase in (*phases.values(), first))
    figures["finite"] = bool(torch.isfinite(state.latents).all())
    if options.residency.streams:
        figures["copies"] = copying(options.residency.streams, copies, args.steps)
    return figures, [state.latents.cpu(), *frames]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that does not ask what the bits mean."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def copying(streams: Any, copies: list[int], steps: int) -> dict[str, float]:
    """What the steps copied, and how long the same copies take with nothing else to do."""
    alone_ms = copied_bytes = 0.0
    for stream, count in zip(streams, copies, strict=True):
        before = stream.copies
        with Phase() as phase:
            for _ in range(2):
                for index in range(len(stream)):
                    stream.enter(index)
        made = max(1, stream.copies - before)
        alone_ms += phase.ms / made * count / steps
        copied_bytes += stream.host_bytes / max(1, len(stream)) * count / steps
    rate = copied_bytes / 1e6 / alone_ms if alone_ms else 0.0
    return {"gb_per_step": gb(copied_bytes), "ms_alone": round(alone_ms, 2), "gb_per_s": round(rate, 1)}


def resident_run(*arguments: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Without a cap; a model that does not fit gives its error in place of figures."""
    try:
        return run(*arguments, ())
    except torch.OutOfMemoryError as error:
        return {"error": str(error).split(". ")[0]}, []
    finally:
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    spec = identify(root)
    wanted = SamplingParams(
        prompt="a red cat on a blue chair", seed=7, num_inference_steps=args.steps + 1, num_outputs_per_prompt=1,
        height=args.height, width=args.width, num_frames=args.frames,
    )  # fmt: skip
    jobs = check_jobs(spec, [("", wanted)], GenerateArgs())
    (root / "inputs").mkdir(exist_ok=True)
    (request,) = requests(spec, jobs, InputStore(root / "inputs"))
    load = loader_without_files(spec)
    resident, expected = ({}, []) if args.no_resident else resident_run(load, spec, request, args)
    print(json.dumps({"resident": resident}), file=sys.stderr, flush=True)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gb * GIB / total), DEVICE)
    offloaded, made = run(load, spec, request, args, tuple(args.offload.split(",")))
    report: dict[str, Any] = {"variant": spec.variant, "resident": resident, "offloaded": offloaded}
    if expected:
        report["equal"] = [same_bits(a, b) for a, b in zip(expected, made, strict=True)]
        if "copies" in offloaded:
            exposed = max(0.0, offloaded["ms_per_step"] - resident["ms_per_step"])
            report["overlap_share"] = round(max(0.0, 1.0 - exposed / max(1e-9, offloaded["copies"]["ms_alone"])), 4)
    return report


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a full-size random model offloaded, under a memory cap.")
    parser.add_argument("--family", default="wan", help=f"the beginning of one of {', '.join(CHECKPOINTS)}")
    parser.add_argument("--size", help="of make_checkpoint; default: its last")
    parser.add_argument("--variant", help="a published variant whose transformer replaces that of the size")
    parser.add_argument("--cap-gb", type=float, default=24.0, help="GiB for the offloaded run")
    parser.add_argument("--offload", default=",".join(ALL), help="components")
    parser.add_argument("--no-pin", action="store_true", help="as --no-pin-cpu-memory")
    parser.add_argument("--no-resident", action="store_true", help="only the offloaded run")
    parser.add_argument("--steps", type=int, default=3, help="timed ones, after one that is not")
    parser.add_argument("--frames", type=int, help="default: 33 of a video")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--chunks", type=int, default=3, help="of frames to decode")
    args = parser.parse_args(argv)
    names = [name for name in CHECKPOINTS if name.startswith(args.family)]
    if not names:
        parser.error(f"--family: one of {', '.join(CHECKPOINTS)} expected, got {args.family!r}")
    sizes = list(CHECKPOINTS[names[0]])
    args.family, args.size = names[0], args.size or sizes[-1]
    if args.size not in sizes:
        parser.error(f"--size: one of {', '.join(sizes)} expected, got {args.size!r}")
    if args.variant is None and args.size == sizes[-1]:
        args.variant = VARIANTS.get(args.family)
    if args.frames is None and args.family.startswith("wan"):
        args.frames = 33
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        root = Path(temporary) / "model"
        configurations(args.family, args.size, args.variant, root)
        measured = measure(args, root)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    print(json.dumps({"commit": commit(), "device": name, "torch": torch.__version__, **vars(args), **measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
