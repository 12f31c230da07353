"""Our Wan pipeline and diffusers' WanPipeline on one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from parity.compare import (
    CONTROL_FACTOR,
    TOLERANCE,
    Control,
    breaking,
    decode_all,
    errors,
    load_ours,
    load_tokenizer,
    run,
)
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec

__all__ = ["CASES", "CHECKPOINT", "CONTROLS", "CONTROL_FACTOR", "TOLERANCE", "Case", "Parity", "decode_all", "errors"]
CHECKPOINT = "wan2.1-t2v"


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

    @property
    def settings(self) -> str:
        """For the table."""
        return f"{self.width}x{self.height}, {self.num_frames} frames, {self.steps}, {self.guidance}, {self.sampler}"


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
        self.ours, self.tokenizer = load_ours(folder), load_tokenizer(folder)
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

    def run_ours(self, case: Case, pipeline: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `compare.run`."""
        return run(pipeline or self.ours, self.request(case))

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


def _without_rope(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    table = inner.rope(latents.shape)
    return inner(latents, timestep, text, rotary=type(table)(torch.ones_like(table[0]), torch.zeros_like(table[1])))


def _without_padding(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    rows = zip(latents, timestep, text.embeds, strict=True)
    kept = [inner(x[None], t[None], type(text)(e[e.abs().sum(-1) > 0][None])) for x, t, e in rows]
    return torch.cat(kept)


def _swapped_branches(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    return inner(latents, timestep, type(text)(text.embeds.flip(0)))


CONTROLS = (
    Control("without RoPE", breaking(_without_rope)),
    Control("text without its zero padding", breaking(_without_padding)),
    Control("prompt and negative prompt swapped", breaking(_swapped_branches)),
    Control("another prompt", case=replace(CASES[0], prompt="the dog")),
    Control("another negative prompt", case=replace(CASES[0], negative="")),
    Control("another shift", lambda pipeline: replace(pipeline, flow=replace(pipeline.flow, shift=5.0))),
    Control("another seed", case=replace(CASES[0], seed=8)),
    Control("another sampler", case=replace(CASES[0], sampler="euler")),
)
