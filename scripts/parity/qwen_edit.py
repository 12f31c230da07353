"""Our Qwen-Image-Edit pipelines and diffusers' on one checkpoint: -Edit, and -2509 and -2511 (up to three pictures)."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from parity.compare import CONTROL_FACTOR, TOLERANCE, Control, breaking, errors
from parity.qwen import Case, Parity, padded, unscaled, with_flow, without_rope
from safelight.runtime.models.encoders.qwen2_5_vl import Qwen25VL, SeenPictures
from safelight.runtime.models.qwen.pipeline import QwenPipeline
from safelight.runtime.models.qwen.transformer import QwenInputs

__all__ = ["CASES", "CHECKPOINT", "CONTROLS", "CONTROL_FACTOR", "TOLERANCE", "Case", "Parity", "errors"]
CHECKPOINT = "qwen-image-edit-plus"

CASES = (
    Case("2 pictures", pictures=2),
    Case("1 picture, odd multiples of 16", pictures=1, width=48, height=80, prompt="make it green"),
    Case("3 pictures, a long prompt", pictures=3, width=32, height=112, prompt="make the dog red, " * 9),
    Case("1 picture, guidance off", pictures=1, scale=1.0),
    Case("2 outputs per prompt", pictures=1, outputs=2, negative="blue", steps=2),
)


def _without_pictures(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, given: QwenInputs) -> Any:
    return inner(latents, timestep, given._replace(references=()))


def _swapped(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, given: QwenInputs) -> Any:
    return inner(latents, timestep, given._replace(references=given.references[::-1]))


class Blind(Qwen25VL):
    """Sees patches of nothing in place of the pictures."""

    def encode(self, prompts: Any, drop: int, pictures: SeenPictures | None = None) -> list[torch.Tensor]:
        assert pictures is not None
        return super().encode(prompts, drop, SeenPictures(torch.zeros_like(pictures.patches), pictures.grids))


def blind(pipeline: QwenPipeline) -> QwenPipeline:
    seeing = pipeline.text_encoder
    blinded = Blind(**{field.name: getattr(seeing, field.name) for field in fields(Qwen25VL)})
    return replace(pipeline, text_encoder=blinded)


CONTROLS = (
    Control("without RoPE", breaking(without_rope)),
    Control("text with two tokens of padding", breaking(padded)),
    Control("guidance without rescaling", unscaled),
    Control("without the terminal shift", with_flow(terminal=None)),
    Control("pictures that only the text encoder sees", breaking(_without_pictures)),
    Control("pictures in the other order", breaking(_swapped)),
    Control("a text encoder that sees no pictures", blind),
    Control("one picture less", case=replace(CASES[0], pictures=1)),
    Control("another instruction", case=replace(CASES[0], prompt="the dog")),
)
