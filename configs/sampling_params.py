"""The sampling parameters of one request, under SGLang Diffusion's names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from safelight.configs.options import check_options, option
from safelight.runtime.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Fields left None take the model variant's default (`merged_over`). Sizes are pixels, fps frames per second.

    Types are checked here (InvalidRequest); which values a model takes is checked by its family.
    """

    prompt: str = option("", "what to make")
    negative_prompt: str | None = option(None, "what to keep away from")
    height: int | None = option(None, "pixels")
    width: int | None = option(None, "pixels")
    num_frames: int | None = option(None, "1 makes a picture, more a video")
    fps: int | None = option(None, "frames per second of a video")
    num_inference_steps: int | None = option(None, "denoising steps")
    guidance_scale: float | None = option(None, "classifier-free guidance; 1 switches it off")
    seed: int | None = option(None, "of the noise; output i uses seed + i; unset: drawn")
    num_outputs_per_prompt: int | None = option(None, "pictures or videos per prompt")
    sampler: str | None = option(None, "flow-matching sampler, as `safelight models` lists them")
    image_path: str = option("", "picture to start from: PNG, JPEG or WebP")
    previews: int = option(0, "small pictures of each output while it is made, evenly spaced", minimum=0)

    def __post_init__(self) -> None:
        check_options(self, InvalidRequest)

    def merged_over(self, defaults: SamplingParams) -> SamplingParams:
        """This request with every None replaced by the default's value."""
        unset = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is None}
        return dataclasses.replace(self, **unset)
