#!/usr/bin/env python3
"""Times one forward of an image family's transformer, ours beside diffusers', on one set of random weights.

    scripts/bench_image.py qwen-image [--size full|tiny] [--height 1024] [--width 1024] [--text 64] [--pictures 0]

The weights are made on the device and shared by all variants (20 billion parameters do not fit twice), so a variant's
own memory is what it fuses. Prints one JSON line: median milliseconds of every variant (interleaved rounds, device
events, fresh random inputs each time) and the relative L2 distance of each from diffusers' eager forward. A variant
that fails is reported with its error; the others are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from bench_denoise import commit, timed
from checkpoints.parts import randomize
from checkpoints.qwen import CHECKPOINTS as QWEN
from torch import Tensor, nn

from safelight.kernels.dispatch import KernelSet, reference_kernels, triton_kernels
from safelight.runtime.models.qwen.transformer import QwenConfig, QwenInputs, QwenTransformer
from safelight.runtime.models.qwen.weights import name_map
from safelight.runtime.parallel.mesh import ParallelMesh

PICTURE_TEXT = 192  # text tokens of a picture to edit: 384x384 pixels


@dataclass(frozen=True, slots=True)
class Shape:
    """Pixels of the result, tokens of text without pictures, and pictures of 1024x1024 to edit."""

    height: int
    width: int
    text: int
    pictures: int
    batch: int


Forward = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """How a family's transformers are built and called on inputs drawn from a generator."""

    reference: Callable[[str], nn.Module]  # size -> on the meta device
    reference_tables: Callable[[nn.Module], None]  # what no weight file has, off the meta device
    ours: Callable[[nn.Module, KernelSet, torch.device], nn.Module]
    draw: Callable[[nn.Module, Shape, torch.Generator], Any]
    call_reference: Callable[[nn.Module, Any], Tensor]
    call_ours: Callable[[nn.Module, Any], Tensor]


def qwen_reference(size: str) -> nn.Module:
    made: nn.Module = QWEN["qwen-image"][size]().components["transformer"].build()
    return made


def qwen_tables(model: Any) -> None:
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    model.pos_embed = QwenEmbedRope(10000, list(model.config.axes_dims_rope), scale_rope=True)


def qwen_ours(reference: Any, kernels: KernelSet, device: torch.device) -> nn.Module:
    config = QwenConfig.from_json(dict(reference.config))
    with torch.device("meta"):
        model = QwenTransformer(config, ParallelMesh.single(), kernels)
    stored = dict(reference.named_parameters())
    for name, sources in name_map(config).items():
        owner, _, leaf = name.rpartition(".")
        tensors = [stored[source] for source in sources]
        tensor = tensors[0].data if len(tensors) == 1 else torch.cat([t.data for t in tensors])
        kept = tensor.float() if name.startswith("time_embedding") else tensor
        setattr(model.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=False))
    model.rotary.to(device)
    return model.eval()


def qwen_draw(reference: Any, shape: Shape, generator: torch.Generator) -> Any:
    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=generator.device).bfloat16()

    channels, batch = int(reference.config.out_channels), shape.batch
    latents = noise(batch, channels, 1, shape.height // 8, shape.width // 8)
    pictures = tuple(noise(batch, channels, 1, 128, 128) for _ in range(shape.pictures))
    tokens = shape.text + shape.pictures * PICTURE_TEXT
    timestep = torch.full((batch,), 500.0, device=generator.device)
    return latents, pictures, noise(batch, tokens, int(reference.config.joint_attention_dim)), timestep


def qwen_call_reference(model: Any, inputs: Any) -> Tensor:
    from diffusers import QwenImagePipeline

    latents, pictures, text, timestep = inputs
    every = (latents, *pictures)
    packed = [QwenImagePipeline._pack_latents(p, len(p), p.shape[1], *p.shape[-2:]) for p in every]
    shapes = [[(1, p.shape[-2] // 2, p.shape[-1] // 2) for p in every]] * len(text)
    dtype = next(model.parameters()).dtype
    out: Tensor = model(
        torch.cat(packed, dim=1).to(dtype),
        encoder_hidden_states=text.to(dtype),
        timestep=timestep.to(dtype) / 1000,
        img_shapes=shapes,
        return_dict=False,
    )[0][:, : packed[0].shape[1]]
    height, width = latents.shape[-2:]
    made: Tensor = QwenImagePipeline._unpack_latents(out, 8 * height, 8 * width, 8)
    return made


def qwen_call_ours(model: nn.Module, inputs: Any) -> Tensor:
    latents, pictures, text, timestep = inputs
    out: Tensor = model(latents, timestep, QwenInputs(text, pictures))
    return out


CASES: Mapping[str, Case] = {
    "qwen-image": Case(qwen_reference, qwen_tables, qwen_ours, qwen_draw, qwen_call_reference, qwen_call_ours),
}


def weights(case: Case, size: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """diffusers' transformer with random weights, made on the device."""
    with torch.device("meta"):
        model = case.reference(size)
    model = model.to(dtype).to_empty(device=device)
    case.reference_tables(model)
    randomize(model, torch.Generator(device).manual_seed(0))
    return model.eval().requires_grad_(False)


def twin(case: Case, model: nn.Module, size: str) -> nn.Module:
    """Another module of the same tensors, to be compiled."""
    with torch.device("meta"):
        made = case.reference(size)
    made.load_state_dict(model.state_dict(), assign=True)
    case.reference_tables(made)
    return made.eval().requires_grad_(False)


def variants(case: Case, base: nn.Module, size: str, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Everything that is measured: a name and how the call on inputs is made."""

    def theirs(compiled: bool) -> Any:
        model: Any = twin(case, base, size) if compiled else base
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)
        return lambda inputs: case.call_reference(model, inputs)

    def ours(kernels: KernelSet, compiled: bool) -> Any:
        model: Any = case.ours(base, kernels, device)
        if compiled:
            model.compile_blocks()
        return lambda inputs: case.call_ours(model, inputs)

    made: dict[str, Callable[[], Any]] = {
        "diffusers": lambda: theirs(False),
        "diffusers_compiled": lambda: theirs(True),
    }
    kernels = triton_kernels() if device.type == "cuda" else reference_kernels()
    name = "ours_" + kernels.name
    return made | {name: lambda: ours(kernels, False), name + "_compiled": lambda: ours(kernels, True)}


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    case = CASES[args.family]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = weights(case, args.size, device, dtype)
    shape = Shape(args.height, args.width, args.text, args.pictures, args.batch)
    generator, errors = torch.Generator(device).manual_seed(1), {}
    ready: dict[str, Any] = {}
    for name, build in variants(case, base, args.size, device).items():
        if args.only and name not in args.only.split(","):
            continue
        start = time.perf_counter()
        try:
            call = build()
            for _ in range(3):
                call(case.draw(base, shape, generator))
            if device.type == "cuda":
                torch.cuda.synchronize()
            ready[name] = call
        except Exception as error:  # a failing variant must not lose the others' figures
            errors[name] = f"{type(error).__name__}: {error}"[:600]
        print(f"{name}: ready after {time.perf_counter() - start:.1f} s {errors.get(name, '')}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(args.rounds):
        for name, call in ready.items():
            inputs = case.draw(base, shape, generator)
            times[name].append(timed(lambda c=call, i=inputs: c(i), device))  # type: ignore[misc]
    inputs = case.draw(base, shape, generator)
    exact = case.call_reference(base, inputs).float()
    apart = {name: float((call(inputs).float() - exact).norm() / exact.norm()) for name, call in ready.items()}
    return {
        "forward_ms": {name: round(statistics.median(values), 2) for name, values in times.items()},
        "forward_ms_range": {name: [round(min(v), 2), round(max(v), 2)] for name, v in times.items()},
        "relative_l2_from_diffusers": {name: round(value, 5) for name, value in apart.items()},
        "errors": errors,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Time one image transformer forward beside diffusers.")
    parser.add_argument("family", choices=sorted(CASES))
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--text", type=int, default=64, help="tokens of text, pictures not counted")
    parser.add_argument("--pictures", type=int, default=0, help="pictures of 1024x1024 to edit")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", help="comma-separated variants; default: all")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        measured = measure(args, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"commit": commit(), "device": name, "torch": torch.__version__, **vars(args), **measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
