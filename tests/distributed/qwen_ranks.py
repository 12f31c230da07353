"""One of the four ranks of the Qwen-Image tests; `test_qwen_ranks.py` starts it.

Runs every batch on every layout, those of two ranks on two pairs of ranks at once, and writes this rank's results to
FOLDER/RANK.safetensors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_processes import module
from safetensors.torch import save_file

from safelight.runtime.models.qwen.pipeline import QwenPipeline
from safelight.runtime.models.qwen.transformer import QwenTransformer
from safelight.runtime.parallel.mesh import Axis, ParallelMesh, build_mesh

FAMILY = module(Path(__file__).parents[2] / "scripts" / "parity_table.py").family("qwen")
Case = FAMILY.Case
STEPS = 2


def batches(edits: bool) -> dict[str, list[Any]]:
    """Prompts of other lengths side by side, guided and not; pictures of two sizes. 12 to 20 tokens of result."""
    if edits:
        guided = [Case("", pictures=2, prompt="red", steps=STEPS), Case("", pictures=1, prompt="a dog", steps=STEPS)]
        return {"edits": guided, "edit_unguided": [Case("", pictures=1, scale=1.0, width=80, height=64, steps=STEPS)]}
    short, long = Case("", prompt="a cat", steps=STEPS), Case("", prompt="the dog is blue, and more", steps=STEPS)
    unguided = [replace(case, scale=1.0, width=48, height=48) for case in (short, long)]
    return {"guided": [short, replace(long, scale=2.0, negative="a cat")], "unguided": unguided}


@torch.inference_mode()
def run(both: Any, pipeline: QwenPipeline, edits: bool) -> dict[str, torch.Tensor]:
    """Every batch's final latents and pictures."""
    results = {}
    for name, cases in batches(edits).items():
        requests = [both.request(case) for case in cases]
        states = [pipeline.prepare(request, pipeline.encode(request), 0) for request in requests]
        for _ in range(STEPS):
            states = pipeline.step(states)
        results[name] = torch.stack([state.latents for state in states])
        results[f"{name} pictures"] = torch.stack([pipeline.decode(state, None)[0].frames for state in states])
    return results


def on_mesh(pipeline: QwenPipeline, mesh: ParallelMesh) -> QwenPipeline:
    """The same weights over another mesh."""
    with torch.device("meta"):
        transformer = QwenTransformer(pipeline.transformer.config, mesh, pipeline.transformer.kernels)
    transformer.load_state_dict(pipeline.transformer.state_dict(), assign=True)
    vae = replace(pipeline.vae, group=mesh.world)
    return replace(pipeline, mesh=mesh, transformer=transformer.eval(), vae=vae)


def pair_mesh(rank: int, pair: dist.ProcessGroup, cfg: int, ring: int, ulysses: int) -> ParallelMesh:
    """A mesh of two of the ranks, which share one axis."""
    degrees = {Axis.CFG: cfg, Axis.RING: ring, Axis.ULYSSES: ulysses}
    assert sorted(degrees.values()) == [1, 1, 2]
    return ParallelMesh(rank, 2, degrees, {axis: pair if n == 2 else None for axis, n in degrees.items()}, pair)


def main(
    rank: int,
    world: int,
    group: dist.ProcessGroup,
    models: dict[bool, Path],
    layouts: list[tuple[int, int, int]],
    folder: Path,
) -> None:
    assert world == 4
    results: dict[str, torch.Tensor] = {}
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    for edits, root in models.items():
        both = FAMILY.Parity(root, reference=False)
        for cfg, ring, ulysses in layouts:
            whole = cfg * ring * ulysses == world
            mesh = build_mesh(group, cfg, ring, ulysses) if whole else pair_mesh(rank % 2, pair, cfg, ring, ulysses)
            pipeline = on_mesh(both.ours, mesh)
            made = run(both, pipeline, edits)
            results |= {f"{cfg}x{ring}x{ulysses} {name}": value.contiguous() for name, value in made.items()}
    save_file(results, folder / f"{rank}.safetensors")
