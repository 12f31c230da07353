"""The sampling parameters of one request, under SGLang Diffusion's names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Fields left None take the model variant's default (`merged_over`). Sizes are pixels, fps frames per second."""

    prompt: str = ""
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    num_outputs_per_prompt: int | None = None
    sampler: str | None = None

    def merged_over(self, defaults: SamplingParams) -> SamplingParams:
        """This request with every None replaced by the default's value."""
        unset = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is None}
        return dataclasses.replace(self, **unset)
