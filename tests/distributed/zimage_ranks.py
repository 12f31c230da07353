"""One rank of the Z-Image tests; `test_zimage_ranks.py` starts it.

Runs every job on every layout of up to its number of ranks, and writes this rank's results to FOLDER/RANK.safetensors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from safelight.configs.families import identify
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.zimage.pipeline import ZImagePipeline, load
from safelight.runtime.models.zimage.transformer import ZImageTransformer
from safelight.runtime.parallel.mesh import Axis, ParallelMesh, build_mesh
from safelight.runtime.text.qwen2 import Qwen2Tokenizer
from safelight.runtime.text.zimage import load_tokenizer

STEPS = 2
LAYOUTS = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 3, 1), (1, 1, 3), (2, 1, 2), (1, 2, 2), (1, 1, 4), (2, 2, 1))
LONG = "an old house and green trees in the rain, " * 3


def request(tokenizer: Qwen2Tokenizer, prompt: str, guidance: float, seed: int) -> GenerationRequest:
    return GenerationRequest(
        prompt=prompt,
        negative_prompt="the worst",
        token_ids=tokenizer.encode_request(prompt, "the worst"),
        height=80,
        width=112,  # 35 image tokens and 29 of padding
        num_frames=1,
        fps=8,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        seed=seed,
        num_outputs=1,
        sampler="euler",
        media=MediaSpec(MediaFormat.NPY),
    )


def run(pipeline: ZImagePipeline, tokenizer: Qwen2Tokenizer) -> dict[str, torch.Tensor]:
    """The final latents of two batches: guided, with captions of two lengths, and unguided."""
    batches = {
        "guided": [request(tokenizer, "a red cat", 2.0, 1), request(tokenizer, LONG, 1.5, 2)],
        "unguided": [request(tokenizer, LONG, 0.0, 3)],
    }
    results = {}
    for name, requests in batches.items():
        states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in requests]
        for _ in range(STEPS):
            states = pipeline.step(states)
        results[name] = torch.stack([state.latents for state in states])
    return results


def loaded(model: Path) -> tuple[ZImagePipeline, Qwen2Tokenizer]:
    """On one rank."""
    spec = identify(model)
    options = LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, ParallelMesh.single())
    return load(spec, options), load_tokenizer(model, spec)


def on_mesh(pipeline: ZImagePipeline, mesh: ParallelMesh) -> ZImagePipeline:
    """The same weights over another mesh."""
    with torch.device("meta"):
        transformer = ZImageTransformer(pipeline.transformer.config, mesh, pipeline.transformer.kernels)
    transformer.load_state_dict(pipeline.transformer.state_dict(), assign=True)
    transformer.rotary = pipeline.transformer.rotary
    return replace(pipeline, mesh=mesh, transformer=transformer.eval())


def first_ranks(rank: int, cfg: int, ring: int, ulysses: int) -> ParallelMesh | None:
    """A mesh of the first ranks along one axis, None on the others. All ranks of the world call it."""
    degrees = {Axis.CFG: cfg, Axis.RING: ring, Axis.ULYSSES: ulysses}
    size = cfg * ring * ulysses
    group = dist.new_group(list(range(size)))
    if rank >= size:
        return None
    groups = {axis: group if degree == size else None for axis, degree in degrees.items()}
    return ParallelMesh(rank, size, degrees, groups, group)


def main(rank: int, world: int, group: dist.ProcessGroup, model: Path, folder: Path) -> None:
    whole, tokenizer = loaded(model)
    results: dict[str, torch.Tensor] = {}
    for layout in LAYOUTS:
        size = layout[0] * layout[1] * layout[2]
        mesh = build_mesh(group, *layout) if size == world else first_ranks(rank, *layout)
        if mesh is not None:
            made = run(on_mesh(whole, mesh), tokenizer)
            results |= {f"{layout} {name}": value.contiguous() for name, value in made.items()}
    dist.barrier(group)
    save_file(results, folder / f"{rank}.safetensors")
