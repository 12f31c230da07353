"""The sampling parameters of one request, under SGLang Diffusion's names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from safelight.configs.options import as_tuple, check_options, option
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
    image_path: tuple[str, ...] = option(
        (), "picture to start from or to edit: PNG, JPEG or WebP; again for more pictures, in order"
    )
    true_cfg_scale: float | None = option(
        None, "classifier-free guidance of models that --guidance-scale steers another way; 1 switches it off"
    )
    cfg_normalization: float | None = option(
        None, "longest that a guided prediction may be, in lengths of the conditional one; 0: any"
    )
    cfg_truncation: float | None = option(
        None, "share of the way from noise to picture after which guidance is switched off; 1: never"
    )
    previews: int = option(0, "small pictures of each output while it is made, evenly spaced", minimum=0)

    def __post_init__(self) -> None:
        check_options(self, InvalidRequest)
        object.__setattr__(self, "image_path", as_tuple(self.image_path))  # a string or a list is taken too

    @staticmethod
    def of(request: Any) -> SamplingParams:
        """The parameters of a `runtime.messages.GenerationRequest` (which this layer does not import), complete;
        its pictures by what is in them."""
        return SamplingParams(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            fps=request.fps,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            seed=request.seed,
            num_outputs_per_prompt=request.num_outputs,
            sampler=request.sampler,
            image_path=tuple(image.sha256 for image in request.images),
            true_cfg_scale=request.true_cfg_scale,
            cfg_normalization=request.cfg_normalization,
            cfg_truncation=request.cfg_truncation,
            previews=request.previews,
        )

    def merged_over(self, defaults: SamplingParams) -> SamplingParams:
        """This request with every None replaced by the default's value."""
        unset = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is None}
        return dataclasses.replace(self, **unset)
