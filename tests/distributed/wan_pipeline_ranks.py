"""One rank of the pipeline tests; `test_wan_pipeline_ranks.py` starts it.

Runs every job on every layout of its number of ranks, counts the bytes that one guided step sends, and writes this
rank's results to FOLDER/RANK.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from safelight.configs.families import identify
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.wan.pipeline import WanPipeline, load
from safelight.runtime.models.wan.transformer import WanTransformer
from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh
from safelight.runtime.text.t5 import T5Tokenizer, load_tokenizer

STEPS = 4


def request(tokenizer: T5Tokenizer, prompt: str, guidance: float, sampler: str, frames: int) -> GenerationRequest:
    return GenerationRequest(
        prompt=prompt,
        negative_prompt="bad",
        token_ids=tokenizer.encode_request(prompt, "bad"),
        height=48,
        width=80,  # 15 tokens a frame
        num_frames=frames,
        fps=8,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        seed=3,
        num_outputs=1,
        sampler=sampler,
        media=MediaSpec(MediaFormat.NPY),
    )


def batches(tokenizer: T5Tokenizer) -> dict[str, list[GenerationRequest]]:
    """Guided and unguided videos and pictures, alone and three at a time with prompts and scales of their own.

    Guidance by g multiplies the rounding errors of both predictions by up to 2g - 1.
    """
    video, picture = (9, 1)
    return {
        "video": [request(tokenizer, "a red cat", 3.0, "unipc", video)],
        "videos": [request(tokenizer, f"the dog {n}", 2.0 + n / 2, ("euler", "unipc")[n % 2], video) for n in range(3)],
        "picture": [request(tokenizer, "a red cat", 2.0, "euler", picture)],
        "pictures_unguided": [request(tokenizer, f"a blue dog {n}", 1.0, "unipc", picture) for n in range(3)],
        "video_unguided": [request(tokenizer, "a blue dog", 1.0, "unipc", video)],
    }


def run(pipeline: WanPipeline, tokenizer: T5Tokenizer, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every batch's final latents, and those of the checkpoint (made after two steps when it is not there) resumed."""
    results = {}
    for name, requests in batches(tokenizer).items():
        states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in requests]
        for step in range(STEPS):
            if step == 2 and name == "video" and not checkpoint.exists():
                save_file(pipeline.save(states[0]), checkpoint)
            states = pipeline.step(states)
        results[name] = torch.stack([state.latents for state in states])
        if name == "video":
            resumed = [pipeline.load(requests[0], pipeline.encode(requests[0]), load_file(checkpoint))]
            while resumed[0].step < STEPS:
                resumed = pipeline.step(resumed)
            results["resumed"] = resumed[0].latents
    return results


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that this rank sends to other ranks, by the collective that sends them, and the number of all-to-alls."""
    sent = {"all_to_all": 0, "ring": 0, "all_gather": 0, "exchanges": 0}
    exchange, p2p, gather = dist.all_to_all_single, dist.batch_isend_irecv, dist.all_gather

    def all_to_all(output: Any, given: Any, incoming: Any, outgoing: Any, group: Any) -> None:
        sent["exchanges"] += 1
        sent["all_to_all"] += (given.numel() - outgoing[dist.get_rank(group)]) * given.element_size()
        exchange(output, given, incoming, outgoing, group=group)

    def batch(ops: Any) -> Any:
        sent["ring"] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return p2p(ops)

    def all_gather(outputs: Any, given: Any, group: Any) -> None:
        sent["all_gather"] += given.nbytes * (len(outputs) - 1)
        gather(outputs, given, group=group)

    with (
        mock.patch.object(dist, "all_to_all_single", all_to_all),
        mock.patch.object(dist, "batch_isend_irecv", batch),
        mock.patch.object(dist, "all_gather", all_gather),
    ):
        yield sent


def bytes_of_a_step(pipeline: WanPipeline, tokenizer: T5Tokenizer) -> dict[str, torch.Tensor]:
    requests = batches(tokenizer)["videos"]
    states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in requests]
    with counted() as sent:
        pipeline.step(states)
    return {f"sent_{name}": torch.tensor(count) for name, count in sent.items()}


def loaded(model: Path, mesh: ParallelMesh) -> tuple[WanPipeline, T5Tokenizer]:
    spec = identify(model)
    pipeline = load(spec, LoadOptions(torch.device("cpu"), torch.float32, torch.float32, None, mesh))
    return pipeline, load_tokenizer(model, spec)


def on_mesh(pipeline: WanPipeline, mesh: ParallelMesh) -> WanPipeline:
    """The same weights over another mesh."""
    with torch.device("meta"):
        transformer = WanTransformer(pipeline.transformer.config, mesh, pipeline.transformer.kernels)
    transformer.load_state_dict(pipeline.transformer.state_dict(), assign=True)
    return replace(pipeline, mesh=mesh, transformer=transformer.eval())


def main(
    rank: int,
    world: int,
    group: dist.ProcessGroup,
    model: Path,
    checkpoint: Path,
    layouts: list[tuple[int, int, int]],
    folder: Path,
) -> None:
    whole, tokenizer = loaded(model, ParallelMesh.single())
    results: dict[str, torch.Tensor] = {}
    for cfg, ring, ulysses in layouts:
        assert cfg * ring * ulysses == world
        pipeline = on_mesh(whole, build_mesh(group, cfg=cfg, ring=ring, ulysses=ulysses))
        made = run(pipeline, tokenizer, checkpoint) | bytes_of_a_step(pipeline, tokenizer)
        results |= {f"{cfg}x{ring}x{ulysses} {name}": value.contiguous() for name, value in made.items()}
    save_file(results, folder / f"{rank}.safetensors")
