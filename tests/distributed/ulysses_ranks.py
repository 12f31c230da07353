"""One rank of the sharded-transformer tests; `test_ulysses.py` starts it.

    ulysses_ranks.py RANK WORLD CFG FOLDER

Runs every case of its layout and writes this rank's results to FOLDER/RANK.safetensors. With WORLD 1 it writes what the
others are compared with.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from safelight.kernels.dispatch import reference_kernels
from safelight.runtime.layers.rope import Rotary
from safelight.runtime.models.wan.transformer import WanConfig, WanText, WanTransformer
from safelight.runtime.parallel.cfg import gather_branches, own_branches
from safelight.runtime.parallel.mesh import Axis, ParallelMesh, build_mesh
from safelight.runtime.parallel.ulysses import gather_tokens, heads_to_tokens, shard_tokens, tokens_to_heads


@dataclass(frozen=True, slots=True)
class Case:
    """One forward: heads, latent frames, height and width (patch 1x2x2), batch size."""

    heads: int
    size: tuple[int, int, int]
    batch: int
    per_token: bool = False

    @property
    def name(self) -> str:
        return f"heads{self.heads}_{'x'.join(map(str, self.size))}_b{self.batch}" + "_tokens" * self.per_token

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1] * self.size[2] // 4


CASES = (
    Case(3, (3, 6, 10), 1),
    Case(3, (1, 6, 6), 2, per_token=True),
    Case(5, (5, 6, 6), 1),
    Case(5, (1, 2, 6), 2),  # 3 tokens: with four ranks one has none
    Case(12, (3, 6, 6), 2),
    Case(12, (1, 10, 10), 1, per_token=True),
    Case(12, (2, 4, 8), 1),
)


def build(case: Case, mesh: ParallelMesh) -> WanTransformer:
    """The case's network with weights that depend on nothing but the case."""
    config = WanConfig(case.heads, 8, 4, 4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2)
    model = WanTransformer(config, mesh, reference_kernels())
    generator = torch.Generator().manual_seed(case.heads)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5
    return model


def inputs(case: Case) -> tuple[Tensor, Tensor, tuple[WanText, WanText]]:
    """Latents, timesteps, and the two branches' texts."""
    g = torch.Generator().manual_seed(11)
    latents = torch.randn(case.batch, 4, *case.size, generator=g)
    timestep = torch.rand(case.batch, *[case.tokens] * case.per_token, generator=g) * 1000
    texts = WanText(torch.randn(case.batch, 9, 16, generator=g)), WanText(torch.randn(case.batch, 9, 16, generator=g))
    return latents, timestep, texts


def run(case: Case, mesh: ParallelMesh, *, swapped: bool = False) -> Tensor:
    """Both branches' predictions (2, B, C, F, h, w); `swapped`: each rank has the next rank's positions and branch."""
    model = build(case, mesh)
    latents, timestep, texts = inputs(case)
    rotary = model.rope(latents.shape)
    if swapped:
        next_rank = (mesh.coordinate(Axis.ULYSSES) + 1) % mesh.degree(Axis.ULYSSES)
        whole, share = model.rotary(model.grid(latents.shape)), rotary.cos.shape[0]
        rotary = Rotary(*(table[next_rank * share :][:share] for table in whole))
    if swapped and mesh.degree(Axis.CFG) == 2:
        texts = texts[1], texts[0]
    own = [model(latents, timestep, texts[branch], rotary=rotary) for branch in own_branches(mesh, 2)]
    return gather_branches(torch.stack(own), 2, group=mesh.group(Axis.CFG))


def collectives(mesh: ParallelMesh) -> dict[str, Tensor]:
    """Errors of each collective against plain slicing, and of each with its inverse."""
    group, u, rank = mesh.group(Axis.ULYSSES), mesh.degree(Axis.ULYSSES), mesh.coordinate(Axis.ULYSSES)
    whole = tuple(torch.arange(2 * 7 * 5 * 3.0).reshape(2, 7, 5, 3) + 1000 * i for i in range(3))
    shards = tuple(shard_tokens(t, group=group) for t in whole)
    by_head = tokens_to_heads(shards, 7, group=group)
    heads = torch.arange(5).tensor_split(u)[rank]
    failures = {
        "tokens_to_heads": not all(torch.equal(h, t[:, :, heads]) for h, t in zip(by_head, whole, strict=True)),
        "heads_to_tokens": not torch.equal(heads_to_tokens(by_head[1], 5, group=group), shards[1]),
        "gather_tokens": not torch.equal(gather_tokens(shards[2], 7, group=group), whole[2]),
    }
    return {f"failed_{name}": torch.tensor(failed) for name, failed in failures.items()}


def main(rank: int, world: int, cfg: int, folder: Path) -> None:
    torch.set_num_threads(1)
    mesh = ParallelMesh.single()
    if world > 1:
        store, limit = (folder / "store").resolve().as_uri(), timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
        assert dist.group.WORLD is not None
        mesh = build_mesh(dist.group.WORLD, cfg=cfg, ring=1, ulysses=world // cfg)
    with torch.inference_mode():
        results = {case.name: run(case, mesh).contiguous() for case in CASES}
        if world > 1:
            results |= {"swapped": run(CASES[-1], mesh, swapped=True).contiguous(), **collectives(mesh)}
    save_file(results, folder / f"{rank}.safetensors")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
