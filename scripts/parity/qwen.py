"""Our Qwen-Image pipelines and diffusers' on one checkpoint. `parity/qwen_edit.py` has the cases with pictures to edit.

Both keep these at some 96x96 pixels, in place of 1024x1024, so that a run takes a moment.
"""

from __future__ import annotations

import importlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from parity.compare import CONTROL_FACTOR, TOLERANCE, Control, breaking, errors, load_ours, load_tokenizer, run
from safelight.configs.families.qwen_pictures import EditRule
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.jobs import request_of
from safelight.runtime.inputs import InputStore, picture_of
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.native import NativePipeline
from safelight.runtime.models.qwen.pipeline import QwenPipeline
from safelight.runtime.models.qwen.transformer import QwenInputs
from safelight.runtime.pipelines.protocol import DenoiseState

__all__ = ["CASES", "CHECKPOINT", "CONTROLS", "CONTROL_FACTOR", "TOLERANCE", "Case", "Parity", "errors"]
CHECKPOINT = "qwen-image"
KEPT, SEEN = 96 * 96, 64 * 64
PICTURES = ((64, 48), (50, 90), (120, 70))
PIPELINES: Mapping[int, str] = {0: "QwenImagePipeline", 1: "QwenImageEditPipeline", 3: "QwenImageEditPlusPipeline"}


@dataclass(frozen=True, slots=True)
class Case:
    """One request. The first prompts have non-ASCII text and runs of spaces on purpose: nothing is cleaned."""

    name: str
    width: int = 64
    height: int = 48
    steps: int = 3
    scale: float = 4.0
    outputs: int = 1
    pictures: int = 0
    prompt: str = "a red cat on the  blue dog &amp; 猫 🐈"
    negative: str = " "
    seed: int = 7

    @property
    def settings(self) -> str:
        """For the table."""
        pictures = f", {self.pictures} pictures" if self.pictures else ""
        return f"{self.width}x{self.height}, {self.steps} steps, true CFG {self.scale}{pictures}"


CASES = (
    Case("64x48"),
    Case("odd multiples of 16", width=48, height=80),
    Case("tall, a long prompt", width=16, height=112, prompt="a dog, " * 20),
    Case("2 steps", steps=2),
    Case("20 steps", steps=20, width=32, height=32),
    Case("guidance off", scale=1.0),
    Case("guidance 1.5", scale=1.5),
    Case("empty prompts", prompt="", negative=""),
    Case("a negative prompt of the prompt's length", prompt="a cat", negative="a dog"),
    Case("3 outputs per prompt", outputs=3, negative="blue"),
)


class Processor(ProcessorMixin):  # type: ignore[misc]
    """What Qwen2VLProcessor does for text and pictures. The class itself needs torchvision, for videos."""

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def __call__(self, text: list[str], images: Any = None, padding: bool = True, return_tensors: str = "pt") -> Any:
        from transformers import BatchFeature

        listed = images if isinstance(images, list) else [images]
        pixels = dict(self.image_processor(images=listed, return_tensors=return_tensors))
        counts = (pixels["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        mark = "<|image_pad|>"
        filled = [_filled(one, mark, counts) for one in text]
        return BatchFeature({**self.tokenizer(filled, padding=padding, return_tensors=return_tensors), **pixels})


def _filled(text: str, mark: str, counts: list[int]) -> str:
    left = iter(counts)
    return re.sub(re.escape(mark), lambda _: mark * next(left), text)


def their_pipeline(folder: Path, name: str) -> Any:
    """The diffusers pipeline of class `name`, put together from the checkpoint's components."""
    import diffusers
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil

    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "vae": diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval(),
        "tokenizer": tokenizer,
        "transformer": diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval(),
    }
    if "Edit" in name:
        parts["processor"] = Processor(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"))
        name_images(parts["text_encoder"])
    made = getattr(diffusers, name)(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def name_images(text_encoder: Any) -> None:
    """Tells the encoder which tokens are images, as transformers 5 wants to be told and diffusers 0.42 does not
    (huggingface/diffusers issue 14194): before, the encoder saw that itself."""
    plain = text_encoder.forward

    def forward(input_ids: Any = None, **others: Any) -> Any:
        kinds = (input_ids == text_encoder.config.image_token_id).int()
        return plain(input_ids=input_ids, mm_token_type_ids=kinds, **others)

    text_encoder.forward = forward


def picture(size: tuple[int, int]) -> Image.Image:
    """Gradients of (width, height)."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    return Image.fromarray(np.stack([x * 3 % 256, y * 5 % 256, (x + 2 * y) % 256], -1).astype("uint8"))


class Parity:
    """Both pipelines on one checkpoint; without `reference` ours alone."""

    def __init__(self, folder: Path, *, reference: bool = True) -> None:
        inputs = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, inputs, ignore_errors=True)
        self.store = InputStore(inputs)
        self.ours, self.tokenizer = self.small(load_ours(folder)), load_tokenizer(folder)
        if self.ours.rule is not None:
            self.tokenizer = replace(self.tokenizer, rule=self.ours.rule)
        if reference:
            self.theirs = their_pipeline(folder, PIPELINES[self.ours.spec.images[1]])
            self._shrink()

    def small(self, pipeline: QwenPipeline) -> QwenPipeline:
        """Of a pipeline, one that keeps pictures small and reads them from this object's store."""
        if (rule := pipeline.rule) is None:
            return pipeline
        seen = KEPT if rule.seen_area == rule.kept_area else SEEN
        return replace(pipeline, rule=EditRule(seen, rule.sized_by, KEPT), pictures=self.store)

    def _shrink(self) -> None:
        """The reference's areas are constants of its module."""
        if self.ours.rule is None:
            return
        module: Any = importlib.import_module(type(self.theirs).__module__)
        dimensions = getattr(module, "_dimensions", module.calculate_dimensions)
        areas = {1024 * 1024: KEPT, 384 * 384: SEEN}
        module._dimensions = dimensions
        module.calculate_dimensions = lambda area, ratio: dimensions(areas[area], ratio)

    def request(self, case: Case) -> GenerationRequest:
        params = SamplingParams(
            prompt=case.prompt,
            negative_prompt=case.negative,
            height=case.height,
            width=case.width,
            num_inference_steps=case.steps,
            true_cfg_scale=case.scale,
            seed=case.seed,
            num_outputs_per_prompt=case.outputs,
        ).merged_over(self.ours.spec.defaults)
        images = tuple(self.store.add(picture_of(picture(size))) for size in PICTURES[: case.pictures])
        return request_of(self.tokenizer, params, MediaSpec(MediaFormat.NPY), images)

    def run_ours(self, case: Case, pipeline: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `compare.run`."""
        return run(pipeline or self.ours, self.request(case))

    @torch.inference_mode()
    def run_reference(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from diffusers, whose pictures are taken as PIL images are made: rounded to 8 bits."""
        images: dict[str, Any] = {}
        if case.pictures:
            given = [picture(size) for size in PICTURES[: case.pictures]]
            images["image"] = given if isinstance_of(self.theirs, "Plus") else given[0]
        kept: list[torch.Tensor] = []

        def keep(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            kept.append(values["latents"])
            return {}

        made = self.theirs(
            prompt=case.prompt,
            negative_prompt=case.negative,
            height=case.height,
            width=case.width,
            num_inference_steps=case.steps,
            true_cfg_scale=case.scale,
            num_images_per_prompt=case.outputs,
            generator=[torch.Generator().manual_seed(case.seed + index) for index in range(case.outputs)],
            output_type="np",
            callback_on_step_end=keep,
            **images,
        ).images
        latents = self.theirs._unpack_latents(kept[-1], case.height, case.width, 8)
        return latents, torch.from_numpy((np.asarray(made) * 255).round().astype("uint8")).unsqueeze(1)


def isinstance_of(pipeline: Any, word: str) -> bool:
    """Whether the pipeline's class has `word` in its name."""
    return word in type(pipeline).__name__


def without_rope(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, given: QwenInputs) -> Any:
    grids = [inner.grid(x.shape) for x in (latents, *given.references)]
    table = inner.rope(grids, given.embeds.shape[1])
    none = type(table)(torch.ones_like(table.cos), torch.zeros_like(table.sin))
    return inner(latents, timestep, given, rotary=none)


def padded(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, given: QwenInputs) -> Any:
    return inner(latents, timestep, given._replace(embeds=torch.nn.functional.pad(given.embeds, (0, 0, 0, 2))))


class Unscaled(QwenPipeline):
    """Guidance without the conditional prediction's length."""

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, state: DenoiseState) -> torch.Tensor:
        return NativePipeline.guide(self, cond, uncond, state)


def unscaled(pipeline: QwenPipeline) -> QwenPipeline:
    return Unscaled(**{field.name: getattr(pipeline, field.name) for field in fields(QwenPipeline)})


def with_flow(**changes: Any) -> Any:
    return lambda pipeline: replace(pipeline, flow=replace(pipeline.flow, **changes))


CONTROLS = (
    Control("without RoPE", breaking(without_rope)),
    Control("text with two tokens of padding", breaking(padded)),
    Control("guidance without rescaling", unscaled),
    Control("without the shift of the image's tokens", with_flow(dynamic=None)),
    Control("without the terminal shift", with_flow(terminal=None)),
    Control("prompt and negative prompt swapped", case=replace(CASES[0], prompt=" ", negative=CASES[0].prompt)),
    Control("another prompt", case=replace(CASES[0], prompt="the dog")),
    Control("another negative prompt", case=replace(CASES[0], negative="")),
    Control("another seed", case=replace(CASES[0], seed=8)),
)
