"""One rank of the pipeline tests; `test_wan_pipeline_ranks.py` starts it.

    wan_pipeline_ranks.py RANK WORLD CFG MODEL FOLDER

Runs each case to its end and writes this rank's latents to FOLDER/RANK.safetensors, and the checkpoint of one of them
after two steps to FOLDER/RANK.checkpoint.safetensors.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from safelight.configs.families import identify
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.wan.pipeline import WanPipeline, load
from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh
from safelight.runtime.text.t5 import T5Tokenizer, load_tokenizer

STEPS = 4


def request(tokenizer: T5Tokenizer, prompt: str, guidance: float, sampler: str) -> GenerationRequest:
    return GenerationRequest(
        prompt=prompt,
        negative_prompt="bad",
        token_ids=tokenizer.encode_request(prompt, "bad"),
        height=48,
        width=32,
        num_frames=5,
        fps=8,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        seed=3,
        num_outputs=1,
        sampler=sampler,
        media=MediaSpec(MediaFormat.NPY),
    )


def run(pipeline: WanPipeline, tokenizer: T5Tokenizer, folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """Latents: a guided batch of two, an unguided job, and the checkpoint of a neighbouring layout, if any, resumed."""
    batch = [request(tokenizer, "a red cat", 5.0, "unipc"), request(tokenizer, "the dog", 2.0, "euler")]
    states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in batch]
    unguided = request(tokenizer, "a blue dog", 1.0, "unipc")
    alone = [pipeline.prepare(unguided, pipeline.encode(unguided), 0)]
    for step in range(STEPS):
        if step == 2:
            save_file(pipeline.save(states[0]), folder / f"{rank}.checkpoint.safetensors")
        states, alone = pipeline.step(states), pipeline.step(alone)
    results = {"unipc": states[0].latents, "euler": states[1].latents, "unguided": alone[0].latents}
    given = folder / "resume.safetensors"
    if given.exists():
        resumed = [pipeline.load(batch[0], pipeline.encode(batch[0]), load_file(given))]
        while resumed[0].step < STEPS:
            resumed = pipeline.step(resumed)
        results["resumed"] = resumed[0].latents
    return results


def main(rank: int, world: int, cfg: int, model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    mesh = ParallelMesh.single()
    if world > 1:
        store, limit = (folder / "store").resolve().as_uri(), timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
        assert dist.group.WORLD is not None
        mesh = build_mesh(dist.group.WORLD, cfg=cfg, ring=1, ulysses=world // cfg)
    spec = identify(model)
    pipeline = load(spec, LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, mesh))
    with torch.inference_mode():
        results = run(pipeline, load_tokenizer(model, spec), folder, rank)
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / f"{rank}.safetensors")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
