"""Our FLUX.1 pipeline and diffusers' FluxPipeline on one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from parity.compare import CONTROL_FACTOR, TOLERANCE, Broken, Control, breaking, errors, load_ours, load_tokenizer, run
from safelight.configs.families.flux_costs import text_tokens
from safelight.runtime.layers.embeddings import packed_to_latents
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.pipelines.ahead import Ahead

__all__ = ["CASES", "CHECKPOINT", "CONTROLS", "CONTROL_FACTOR", "TOLERANCE", "Case", "Parity", "errors"]
CHECKPOINT = "flux1-dev"


@dataclass(frozen=True, slots=True)
class Case:
    """One request. The prompts have non-ASCII text, entities and runs of spaces on purpose."""

    name: str
    width: int = 80
    height: int = 112
    steps: int = 3
    guidance: float = 3.5
    true_cfg: float = 1.0
    outputs: int = 1
    prompt: str = "a RED cat on the  blue dog &amp; 猫"
    negative: str = ""
    seed: int = 7

    @property
    def settings(self) -> str:
        """For the table."""
        guidance = f"guidance {self.guidance}" + (f", true {self.true_cfg}" if self.true_cfg > 1 else "")
        return f"{self.width}x{self.height}, {self.steps} steps, {guidance}"


CASES = (
    Case("odd multiples of 16"),
    Case("wide", width=144, height=48),
    Case("smallest", width=16, height=16),
    Case("1 step", steps=1),
    Case("12 steps", steps=12),
    Case("guidance 1", guidance=1.0),
    Case("guidance 7.5, 3 pictures", guidance=7.5, outputs=3),
    Case("true guidance", true_cfg=2.5, negative="the worst, of all"),
    Case("true guidance, no words", true_cfg=1.5, outputs=2),
    Case("empty prompt", prompt=""),
    Case("a long prompt", prompt="the red dog and the cat " * 90),
)
SCHNELL_CASES = (
    Case("schnell", steps=4, guidance=0.0),
    Case("schnell, wide, 3 pictures", width=144, height=48, steps=4, guidance=0.0, outputs=3),
    Case("schnell, true guidance", steps=2, guidance=0.0, true_cfg=2.0, negative="the worst, of all"),
)


class Parity:
    """Both pipelines on one checkpoint."""

    def __init__(self, folder: Path) -> None:
        diffusers: Any = import_module("diffusers")
        self.ours, self.tokenizer = load_ours(folder), load_tokenizer(folder)
        self.theirs = diffusers.FluxPipeline.from_pretrained(folder, dtype=torch.float32)
        self.theirs.set_progress_bar_config(disable=True)

    def request(self, case: Case) -> GenerationRequest:
        return GenerationRequest(
            prompt=case.prompt,
            negative_prompt=case.negative,
            token_ids=self.tokenizer.encode_request(case.prompt, case.negative),
            height=case.height,
            width=case.width,
            num_frames=1,
            fps=1,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            seed=case.seed,
            num_outputs=case.outputs,
            sampler="euler",
            media=MediaSpec(MediaFormat.NPY),
            true_cfg_scale=case.true_cfg,
        )

    def run_ours(self, case: Case, pipeline: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `compare.run`."""
        return run(pipeline or self.ours, self.request(case))

    def run_reference(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from diffusers, whose pictures are taken as PIL images are made: rounded to 8 bits."""
        pictures = torch.from_numpy((self._call(case, "np") * 255).round().astype("uint8"))
        return self.run_latents(case), pictures[:, None]

    def run_latents(self, case: Case) -> torch.Tensor:
        """Diffusers' latents alone, (N, C, 1, h, w)."""
        return packed_to_latents(self._call(case, "latent"), (1, case.height // 16, case.width // 16), (1, 2, 2))

    def _call(self, case: Case, kind: str) -> Any:
        arguments: dict[str, Any] = {
            "prompt": case.prompt,
            "negative_prompt": case.negative,
            "true_cfg_scale": case.true_cfg,
            "height": case.height,
            "width": case.width,
            "num_inference_steps": case.steps,
            "guidance_scale": case.guidance,
            "num_images_per_prompt": case.outputs,
            "max_sequence_length": text_tokens(self.ours.spec),
        }
        generators = [torch.Generator().manual_seed(case.seed + i) for i in range(case.outputs)]
        return self.theirs(**arguments, generator=generators, output_type=kind).images


def _without_rope(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    table = inner.rope(latents.shape, text.embeds.shape[1])
    return inner(latents, timestep, text, rotary=type(table)(torch.ones_like(table[0]), torch.zeros_like(table[1])))


def _rows_and_columns_swapped(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    turned = inner.rope(latents.transpose(-1, -2).shape, text.embeds.shape[1])
    return inner(latents, timestep, text, rotary=turned)


def _without_padding(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    return inner(latents, timestep, text._replace(embeds=text.embeds[:, :40]))


class _Misled(Broken):
    """The transformer, modulated by what `spoil` makes of the gist and the guidance."""

    def __call__(self, *arguments: Any) -> Any:
        return self.inner(*arguments)

    def modulate(self, timestep: torch.Tensor, *given: torch.Tensor) -> Any:
        return self.inner.modulate(timestep, *self.spoil(*given))


def _misleading(spoil: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[[Any], Any]:
    return lambda p: replace(p, transformer=_Misled(p.transformer, spoil), ahead=Ahead())


def _swapped_streams(inner: Any, latents: torch.Tensor, timestep: torch.Tensor, text: Any) -> Any:
    attention = inner.double_blocks[0].attention
    attention.qkv, attention.text_qkv = attention.text_qkv, attention.qkv
    try:
        return inner(latents, timestep, text)
    finally:
        attention.qkv, attention.text_qkv = attention.text_qkv, attention.qkv


CONTROLS = (
    Control("without RoPE", breaking(_without_rope)),
    Control("rows and columns swapped", breaking(_rows_and_columns_swapped)),
    Control("text without its padding", breaking(_without_padding)),
    Control("without CLIP's gist", _misleading(lambda gist, guidance: (torch.zeros_like(gist), guidance))),
    Control("guidance not embedded", _misleading(lambda gist, guidance: (gist, torch.zeros_like(guidance)))),
    Control("text and image projections swapped", breaking(_swapped_streams)),
    Control("another prompt", case=replace(CASES[0], prompt="the dog")),
    Control("another guidance", case=replace(CASES[0], guidance=2.5)),
    Control("another seed", case=replace(CASES[0], seed=8)),
    Control("true guidance", case=replace(CASES[0], true_cfg=2.0)),
    Control("a shift of another size", lambda p: replace(p, flow=replace(p.flow, dynamic=None))),
)
