"""One rank of the offloading test; `test_offload_ranks.py` starts it.

Loads the model twice, resident and offloaded, over the same mesh, and compares every result of two interleaved jobs.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from safelight.configs.families import identify
from safelight.runtime.messages import GenerationRequest, MediaFormat, MediaSpec
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.wan.pipeline import WanPipeline, load
from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh

ALL = ("dit", "text_encoder", "vae")


def request(seed: int) -> GenerationRequest:
    ids = {"prompt": (5, 9, 12, seed, 1), "negative": (7, 1)}
    media = MediaSpec(MediaFormat.NPY)
    return GenerationRequest("", "", ids, 48, 80, 5, 16, 2, 4.0, seed, 1, "unipc", media)


def run(pipeline: WanPipeline) -> list[torch.Tensor]:
    states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in map(request, (1, 2))]
    results = [state.conditioning.positive for state in states]
    for _ in range(2):
        states = pipeline.step(states)
        results += [state.latents for state in states]
    for state in states:
        cursor = None
        for _ in range(2):
            chunk, cursor = pipeline.decode(state, cursor)
            results.append(chunk.frames)
        assert not pipeline.residency.components_on_device(), "the decoding ended"
    return results


def loaded(model: Path, mesh: ParallelMesh, offload: tuple[str, ...]) -> WanPipeline:
    cpu = torch.device("cpu")
    return load(identify(model), LoadOptions(cpu, torch.float32, torch.float32, None, mesh, offload=offload))


def main(rank: int, world: int, group: dist.ProcessGroup, model: Path, folder: Path) -> None:
    for cfg, ring, ulysses in ((2, 1, 1), (1, 1, 2)):
        mesh = build_mesh(group, cfg=cfg, ring=ring, ulysses=ulysses, encoder=(2, 1))
        expected = run(loaded(model, mesh, ()))
        pipeline = loaded(model, mesh, ALL)
        made = run(pipeline)
        assert [torch.equal(a, b) for a, b in zip(made, expected, strict=True)] == [True] * len(expected), (cfg, ring)
        [stream] = pipeline.residency.streams
        assert stream.copies == 2 * len(stream) + 1
    (folder / f"{rank}").touch()
