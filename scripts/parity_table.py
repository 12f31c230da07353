#!/usr/bin/env python3
"""Prints how far our Wan pipeline is from diffusers' WanPipeline with the same weights, as a markdown table.

    scripts/parity_table.py [--model-path DIR]     # without a directory: a tiny random checkpoint, float32 on the CPU

Each row is a whole run: prompt to latents and to frames. The negative controls run ours with one thing wrong, to show
that the tolerance would see it. `tests/unit/test_wan_pipeline.py` asserts the same cases and controls.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safelight.configs.families import identify
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.wan.pipeline import WanPipeline, load
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import DenoiseState
from safelight.runtime.text.t5 import load_tokenizer

TOLERANCE = 1e-4  # max abs error of latents, float32 on the CPU
CONTROL_FACTOR = 50  # what a negative control must exceed


@dataclass(frozen=True, slots=True)
class Case:
    """One request. The prompts have non-ASCII text, entities and runs of spaces on purpose."""

    name: str
    width: int = 64
    height: int = 32
    num_frames: int = 5
    steps: int = 4
    guidance: float = 5.0
    sampler: str = "unipc"
    outputs: int = 1
    prompt: str = "a red cat on the  blue dog &amp; 猫"
    negative: str = "the worst, of all"
    seed: int = 7


CASES = (
    Case("64x32, 5 frames"),
    Case("odd multiples of 16", width=48, height=80),
    Case("tall", width=16, height=112),
    Case("1 frame", num_frames=1),
    Case("9 frames", num_frames=9),
    Case("13 frames", num_frames=13),
    Case("17 frames", num_frames=17, steps=2),
    Case("1 step", steps=1),
    Case("2 steps", steps=2),
    Case("20 steps", steps=20, num_frames=1),
    Case("guidance off", guidance=1.0),
    Case("guidance 1.5", guidance=1.5),
    Case("no negative prompt", negative=""),
    Case("empty prompt", prompt=""),
    Case("3 outputs per prompt", outputs=3),
    Case("Euler", sampler="euler"),
    Case("Euler, guidance off, 48x48", sampler="euler", guidance=1.0, width=48, height=48),
    Case("Euler, 20 steps, 2 outputs", sampler="euler", steps=20, num_frames=1, outputs=2),
)


class Parity:
    """Both pipelines on one checkpoint."""

    def __init__(self, folder: Path) -> None:
        diffusers: Any = import_module("diffusers")
        self.spec = identify(folder)
        self.tokenizer = load_tokenizer(folder, self.spec)
        single = ParallelMesh.single()
        options = LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, single)
        self.ours = load(self.spec, options)
        self.theirs = diffusers.WanPipeline.from_pretrained(folder, dtype=torch.float32)
        self.theirs.set_progress_bar_config(disable=True)
        self.schedulers: Mapping[str, Any] = {
            "unipc": self.theirs.scheduler,
            "euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=self.ours.flow.shift),
        }

    def request(self, case: Case) -> GenerationRequest:
        return GenerationRequest(
            prompt=case.prompt,
            negative_prompt=case.negative,
            token_ids=self.tokenizer.encode_request(case.prompt, case.negative),
            height=case.height,
            width=case.width,
            num_frames=case.num_frames,
            fps=8,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            seed=case.seed,
            num_outputs=case.outputs,
            sampler=case.sampler,
            media=MediaSpec(MediaFormat.NPY),
        )

    @torch.inference_mode()
    def run_ours(self, case: Case, pipeline: WanPipeline | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """-> latents (N, C, F, h, w) and uint8 frames (N, F, H, W, 3) of all outputs, denoised as one batch."""
        pipeline = pipeline or self.ours
        request = self.request(case)
        conditioning = pipeline.encode(request)
        states = [pipeline.prepare(request, conditioning, index) for index in range(case.outputs)]
        for _ in range(case.steps):
            states = pipeline.step(states)
        return torch.stack([s.latents for s in states]), torch.stack([decode_all(pipeline, s) for s in states])

    def run_reference(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from diffusers, whose frames are taken as PIL images are made: rounded to 8 bits."""
        self.theirs.scheduler = self.schedulers[case.sampler]
        arguments: dict[str, Any] = {
            "prompt": case.prompt,
            "negative_prompt": case.negative,
            "height": case.height,
            "width": case.width,
            "num_frames": case.num_frames,
            "num_inference_steps": case.steps,
            "guidance_scale": case.guidance,
            "num_videos_per_prompt": case.outputs,
        }
        results = []
        for kind in ("latent", "np"):
            generators = [torch.Generator().manual_seed(case.seed + i) for i in range(case.outputs)]
            results.append(self.theirs(**arguments, generator=generators, output_type=kind).frames)
        return results[0], torch.from_numpy((results[1] * 255).round().astype("uint8"))


def decode_all(pipeline: WanPipeline, state: DenoiseState) -> torch.Tensor:
    """All frames of a state, chunk by chunk."""
    chunk, cursor = pipeline.decode(state, None)
    chunks = [chunk.frames]
    while cursor is not None:
        chunk, cursor = pipeline.decode(state, cursor)
        chunks.append(chunk.frames)
    return torch.cat(chunks)


class _Broken(nn.Module):
    """The transformer with something wrong on the way in."""

    def __init__(self, inner: Any, spoil: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.spoil, self.dtype = inner, spoil, inner.dtype

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
        return self.spoil(self.inner, latents, timestep, text)


def _without_rope(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    table = inner.rope(latents.shape)
    return inner(latents, timestep, text, rotary=type(table)(torch.ones_like(table[0]), torch.zeros_like(table[1])))


def _without_padding(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    rows = zip(latents, timestep, text.embeds, strict=True)
    kept = [inner(x[None], t[None], type(text)(e[e.abs().sum(-1) > 0][None])) for x, t, e in rows]
    return torch.cat(kept)


def _swapped_branches(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    return inner(latents, timestep, type(text)(text.embeds.flip(0)))


@dataclass(frozen=True, slots=True)
class Control:
    """Ours with one thing wrong: `spoil` changes the pipeline, `case` the request."""

    name: str
    spoil: Callable[[WanPipeline], WanPipeline] = lambda pipeline: pipeline
    case: Case = CASES[0]


def _breaking(spoil: Callable[..., Any]) -> Callable[[WanPipeline], WanPipeline]:
    return lambda pipeline: replace(pipeline, transformer=_Broken(pipeline.transformer, spoil))  # type: ignore[arg-type]


CONTROLS = (
    Control("without RoPE", _breaking(_without_rope)),
    Control("text without its zero padding", _breaking(_without_padding)),
    Control("prompt and negative prompt swapped", _breaking(_swapped_branches)),
    Control("another prompt", case=replace(CASES[0], prompt="the dog")),
    Control("another negative prompt", case=replace(CASES[0], negative="")),
    Control("another shift", lambda pipeline: replace(pipeline, flow=replace(pipeline.flow, shift=5.0))),
    Control("another seed", case=replace(CASES[0], seed=8)),
    Control("another sampler", case=replace(CASES[0], sampler="euler")),
)


def errors(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, int]:
    """Max abs error of latents, and of frames in 8-bit levels."""
    return float((ours[0] - theirs[0]).abs().max()), int((ours[1].int() - theirs[1].int()).abs().max())


def print_table(parity: Parity) -> bool:
    """True when every case is within the tolerance and every control far outside it."""
    fine = True
    print("| case | size, frames, steps, guidance, sampler | max abs error, latents | frames, levels of 255 |")
    print("|---|---|---|---|")
    for case in CASES:
        latents, levels = errors(parity.run_ours(case), parity.run_reference(case))
        fine = fine and latents <= TOLERANCE and levels <= 1
        settings = f"{case.width}x{case.height}, {case.num_frames}, {case.steps}, {case.guidance}, {case.sampler}"
        print(f"| {case.name} | {settings} | {latents:.1e} | {levels} |")
    print("\n| negative control | max abs error, latents | times the tolerance |\n|---|---|---|")
    theirs = parity.run_reference(CASES[0])
    for control in CONTROLS:
        latents, _ = errors(parity.run_ours(control.case, control.spoil(parity.ours)), theirs)
        fine = fine and latents > CONTROL_FACTOR * TOLERANCE
        print(f"| {control.name} | {latents:.1e} | {latents / TOLERANCE:.0f} |")
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the parity table of the Wan pipeline.")
    parser.add_argument("--model-path", type=Path, help="a Wan 2.1 checkpoint (default: a tiny one, made now)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model_path
        if folder is None:
            folder = Path(scratch)
            import_module("make_checkpoint").make("wan2.1-t2v", folder)
        fine = print_table(Parity(folder))
    verdict = "held" if fine else "NOT held"
    print(f"\nTolerance {TOLERANCE:.0e}; controls must exceed {CONTROL_FACTOR} times that: {verdict}.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
