"""Our Z-Image pipeline and diffusers' ZImagePipeline on one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from parity.compare import Control, breaking, load_ours, load_tokenizer, run
from safelight.runtime.layers.rope import Rotary
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.zimage.transformer import ZImageText
from safelight.runtime.models.zimage.weights import load_transformer
from safelight.runtime.parallel.mesh import ParallelMesh

CHECKPOINT = "z-image"
LONG = "a red cat on the blue dog with an old house, 猫 &amp;  green trees in the rain; " * 3


@dataclass(frozen=True, slots=True)
class Case:
    """One request. The prompts have non-ASCII text, entities and runs of spaces on purpose."""

    name: str
    width: int = 64
    height: int = 48
    steps: int = 3
    guidance: float = 4.0
    outputs: int = 1
    prompt: str = "a red cat on the  blue dog &amp; 猫"
    negative: str = "the worst, of all"
    seed: int = 7
    normalization: float = 0.0
    truncation: float = 1.0

    @property
    def settings(self) -> str:
        """For the table."""
        return f"{self.width}x{self.height}, {self.steps} steps, guidance {self.guidance}"


CASES = (
    Case("64x48"),
    Case("tall, odd multiples of 16, no guidance", width=16, height=112, guidance=0.0),
    Case("long prompt, empty negative prompt, 3 pictures", 80, 112, 2, 3.0, 3, LONG, ""),
    Case("empty prompt, image tokens a multiple of 32", 128, 64, 2, 1.0, 1, ""),
    Case("prediction no longer than the conditional one", normalization=1.0, steps=2),
    Case("guidance for the first steps only", truncation=0.1, steps=4, outputs=2),
    Case("1 step, prompt cut at 512 tokens", steps=1, guidance=0.0, prompt=LONG * 8),
)


class Parity:
    """Both pipelines on one checkpoint."""

    def __init__(self, folder: Path) -> None:
        diffusers: Any = import_module("diffusers")
        self.ours, self.tokenizer = load_ours(folder), load_tokenizer(folder)
        self.theirs = diffusers.ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
        self.theirs.set_progress_bar_config(disable=True)

    def request(self, case: Case) -> GenerationRequest:
        return GenerationRequest(
            prompt=case.prompt,
            negative_prompt=case.negative,
            token_ids=self.tokenizer.encode_request(case.prompt, case.negative),
            height=case.height,
            width=case.width,
            num_frames=1,
            fps=16,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            seed=case.seed,
            num_outputs=case.outputs,
            sampler="euler",
            media=MediaSpec(MediaFormat.NPY),
            cfg_normalization=case.normalization,
            cfg_truncation=case.truncation,
        )

    def run_ours(self, case: Case, pipeline: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `compare.run`."""
        return run(pipeline or self.ours, self.request(case))

    def run_reference(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from diffusers, whose pictures are taken as PIL's are made: rounded to 8 bits. Shapes as ours."""
        generators = [torch.Generator().manual_seed(case.seed + i) for i in range(case.outputs)]
        latents = self.theirs(
            prompt=case.prompt,
            negative_prompt=case.negative,
            height=case.height,
            width=case.width,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            num_images_per_prompt=case.outputs,
            cfg_normalization=case.normalization,
            cfg_truncation=case.truncation,
            generator=generators,
            output_type="latent",
        ).images
        vae = self.theirs.vae
        with torch.inference_mode():
            pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        pictures = self.theirs.image_processor.postprocess(pixels, output_type="np")
        return latents[:, :, None], torch.from_numpy((pictures * 255).round().astype("uint8"))[:, None]


def _without_rope(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    table = inner.rope(latents.shape, text.caption.shape[1])
    return inner(latents, timestep, text, rotary=Rotary(torch.ones_like(table[0]), torch.zeros_like(table[1])))


def _without_padding(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    return inner(latents, timestep, ZImageText(text.caption[:, :-1]))


def _reversed_caption(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    return inner(latents, timestep, ZImageText(text.caption.flip(1)))


def _reloaded(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    def spoil(pipeline: Any) -> Any:
        options = LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, ParallelMesh.single())
        transformer = load_transformer(pipeline.spec.root / "transformer", options)
        change(transformer)
        return replace(pipeline, transformer=transformer)

    return spoil


def _swap_refiners(transformer: Any) -> None:
    first, second = transformer.noise_refiner
    transformer.noise_refiner[0], transformer.noise_refiner[1] = second, first


def _swap_paddings(transformer: Any) -> None:
    transformer.image_pad, transformer.caption_pad = transformer.caption_pad, transformer.image_pad


CONTROLS = (
    Control("without RoPE", breaking(_without_rope)),
    Control("a caption without the end of its padding", breaking(_without_padding)),
    Control("caption tokens in another order", breaking(_reversed_caption)),
    Control("the image's own blocks swapped", _reloaded(_swap_refiners)),
    Control("padding of image and caption swapped", _reloaded(_swap_paddings)),
    Control("another shift", lambda pipeline: replace(pipeline, flow=replace(pipeline.flow, shift=3.0))),
    Control("another prompt", case=replace(CASES[0], prompt="the dog")),
    Control("another negative prompt", case=replace(CASES[0], negative="")),
    Control("another normalization", case=replace(CASES[0], normalization=0.5)),
    Control("another truncation", case=replace(CASES[0], truncation=0.1)),
    Control("another seed", case=replace(CASES[0], seed=8)),
)
