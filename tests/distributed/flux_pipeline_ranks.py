"""One rank of the FLUX pipeline tests; `test_flux_pipeline_ranks.py` starts it.

Runs every job on every layout of its number of ranks, the text encoder's matrices shared by all of them, and writes
this rank's results to FOLDER/RANK.safetensors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from safelight.configs.families import identify
from safelight.runtime.layers.rope import joint_rotary
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.flux import transformer as flux
from safelight.runtime.models.flux.pipeline import FluxPipeline, load
from safelight.runtime.models.flux.transformer import FluxTransformer
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.parallel.joint import JointShare
from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh
from safelight.runtime.text.flux import FluxTokenizer, load_tokenizer

STEPS = 3


def request(tokenizer: FluxTokenizer, prompt: str, guidance: float, true_cfg: float) -> GenerationRequest:
    return GenerationRequest(
        prompt=prompt,
        negative_prompt="bad",
        token_ids=tokenizer.encode_request(prompt, "bad"),
        height=48,
        width=80,  # 15 tokens, beside 512 of text: no share of 2 or 4 ranks is even
        num_frames=1,
        fps=1,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        seed=3,
        num_outputs=1,
        sampler="euler",
        media=MediaSpec(MediaFormat.NPY),
        true_cfg_scale=true_cfg,
    )


def batches(tokenizer: FluxTokenizer) -> dict[str, list[GenerationRequest]]:
    """A picture, three at a time with prompts and guidance of their own, and two with true guidance."""
    return {
        "picture": [request(tokenizer, "a red cat", 3.5, 1.0)],
        "pictures": [request(tokenizer, f"the dog {n}", 1.0 + n, 1.0) for n in range(3)],
        "guided": [request(tokenizer, f"a blue dog {n}", 3.5, 1.25 + n / 4) for n in range(2)],
    }


def run(pipeline: FluxPipeline, tokenizer: FluxTokenizer, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every batch's final latents, those of the checkpoint (made after a step when it is not there) resumed, a picture,
    and the embedded words."""
    results = {}
    for name, requests in batches(tokenizer).items():
        states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in requests]
        for step in range(STEPS):
            if step == 1 and name == "picture" and not checkpoint.exists():
                save_file(pipeline.save(states[0]), checkpoint)
            states = pipeline.step(states)
            if step == 0:
                results[f"{name} after a step"] = torch.stack([state.latents for state in states])
        results[name] = torch.stack([state.latents for state in states])
        if name == "picture":
            resumed = [pipeline.load(requests[0], states[0].conditioning, load_file(checkpoint))]
            while resumed[0].step < STEPS:
                resumed = pipeline.step(resumed)
            results["resumed"] = resumed[0].latents
            results["words"] = states[0].conditioning.branches[0].words
            results["frames"] = pipeline.decode(states[0], None)[0].frames
    return results


def loaded(model: Path, mesh: ParallelMesh) -> tuple[FluxPipeline, FluxTokenizer]:
    spec = identify(model)
    pipeline = load(spec, LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, mesh))
    return pipeline, load_tokenizer(model, spec)


def on_mesh(pipeline: FluxPipeline, mesh: ParallelMesh) -> FluxPipeline:
    """The same weights over another mesh."""
    with torch.device("meta"):
        transformer = FluxTransformer(pipeline.transformer.config, mesh, pipeline.transformer.kernels)
    transformer.load_state_dict(pipeline.transformer.state_dict(), assign=True)
    tables = pipeline.transformer.rotary
    transformer.rotary.cos, transformer.rotary.sin = tables.cos, tables.sin
    return replace(pipeline, mesh=mesh, transformer=transformer.eval())


def shifted(text: Any, image: Any, share: JointShare) -> Any:
    """Rotary tables as if every rank's share began at the first token."""
    return joint_rotary(text, image, replace(share, start=0))


def main(
    rank: int,
    world: int,
    group: dist.ProcessGroup,
    model: Path,
    checkpoint: Path,
    layouts: list[tuple[int, int, int]],
    folder: Path,
) -> None:
    cfg, ring, ulysses = layouts[0]
    mesh = build_mesh(group, cfg=cfg, ring=ring, ulysses=ulysses, encoder=(world, 1))
    whole, tokenizer = loaded(model, mesh)
    results: dict[str, torch.Tensor] = {}
    for cfg, ring, ulysses in layouts:
        pipeline = on_mesh(whole, build_mesh(group, cfg=cfg, ring=ring, ulysses=ulysses))
        made = run(pipeline, tokenizer, checkpoint)
        if ring * ulysses > 1:
            with mock.patch.object(flux, "joint_rotary", shifted):
                state = pipeline.prepare(*_picture(pipeline, tokenizer))
                made["wrong_positions"] = pipeline.step([state])[0].latents
        results |= {f"{cfg}x{ring}x{ulysses} {name}": value.contiguous() for name, value in made.items()}
    save_file(results, folder / f"{rank}.safetensors")


def _picture(pipeline: FluxPipeline, tokenizer: FluxTokenizer) -> tuple[GenerationRequest, Any, int]:
    (wanted,) = batches(tokenizer)["picture"]
    return wanted, pipeline.encode(wanted), 0
