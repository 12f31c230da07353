"""One rank of the test of recorded forwards over several GPUs; `test_forward_graphs_gpu.py` starts it.

In every layout: steps whose forwards, collectives included, are recorded and launched, beside the same steps without.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rank_processes import module

from safelight.configs.families import identify
from safelight.runtime.models.flux.pipeline import FluxPipeline, load
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.parallel.mesh import Axis, build_mesh
from safelight.runtime.pipelines.forward_graphs import ForwardGraphs
from safelight.runtime.pipelines.protocol import DenoiseState
from safelight.runtime.text.flux import load_tokenizer

REQUESTS = Path(__file__).parents[1] / "distributed" / "flux_pipeline_ranks.py"


def main(rank: int, world: int, group: dist.ProcessGroup, model: Path) -> None:
    spec = identify(model)
    tokenizer, requests = load_tokenizer(model, spec), module(REQUESTS)
    for layout in ((world, 1, 1), (1, world, 1), (1, 1, world)):
        mesh = build_mesh(group, *layout)
        assert (mesh.window is not None) == (mesh.degree(Axis.ULYSSES) > 1)
        for dtype in (torch.float32, torch.bfloat16):
            pipeline = load(spec, LoadOptions(torch.device("cuda", rank), dtype, torch.float32, None, mesh))
            for made in requests.batches(tokenizer).values():
                states = [pipeline.prepare(r, pipeline.encode(r), 0) for r in made]
                expected = steps(replace(pipeline, graphs=ForwardGraphs()), states)
                for _ in range(2):
                    assert torch.equal(steps(pipeline, states), expected), (layout, dtype)
            assert pipeline.graphs.count, layout
            pipeline.graphs.clear()


def steps(pipeline: FluxPipeline, states: list[DenoiseState]) -> torch.Tensor:
    for _ in range(3):
        states = pipeline.step(states)
    return torch.stack([state.latents for state in states])
