"""One rank of the sharded-transformer tests; `test_transformer_ranks.py` starts it.

Runs every case on every layout of its number of ranks and writes this rank's results to FOLDER/RANK.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from safelight.kernels.dispatch import KernelSet, reference_kernels
from safelight.runtime.layers.rope import Rotary
from safelight.runtime.models.wan.transformer import WanConfig, WanText, WanTransformer
from safelight.runtime.parallel.cfg import gather_branches, own_branches
from safelight.runtime.parallel.mesh import Axis, ParallelMesh, build_mesh

HEAD_DIM, LAYERS, TEXT = 8, 2, 9


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
    Case(3, (1, 6, 6), 3, per_token=True),
    Case(5, (5, 6, 6), 1),
    Case(5, (1, 2, 6), 3),  # 3 tokens: with four ranks one has none
    Case(12, (3, 6, 6), 3),
    Case(12, (1, 10, 10), 1, per_token=True),
    Case(12, (2, 4, 8), 1),  # equal shares on every layout
)


def layouts(world: int) -> Iterator[tuple[int, int, int]]:
    """Every (cfg, ring, ulysses) of `world` ranks."""
    for cfg in (1, 2):
        yield from ((cfg, r, world // cfg // r) for r in range(1, world + 1) if world % (cfg * r) == 0)


def build(case: Case, mesh: ParallelMesh, kernels: KernelSet) -> WanTransformer:
    """The case's network with weights that depend on nothing but the case."""
    config = WanConfig(case.heads, HEAD_DIM, 4, 4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=LAYERS)
    model = WanTransformer(config, mesh, kernels)
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
    texts = [WanText(torch.randn(case.batch, TEXT, 16, generator=g)) for _ in range(2)]
    return latents, timestep, (texts[0], texts[1])


def predict(case: Case, mesh: ParallelMesh, kernels: KernelSet, *, swapped: bool = False) -> Tensor:
    """Both branches' predictions (2, B, C, F, h, w); `swapped`: each rank has the next rank's positions and branch."""
    model = build(case, mesh, kernels)
    latents, timestep, texts = inputs(case)
    rotary = model.rope(latents.shape)
    if swapped:
        share, shares = rotary.cos.shape[0], mesh.degree(Axis.RING) * mesh.degree(Axis.ULYSSES)
        start = (mesh.rank % shares + 1) % shares * share
        rotary = Rotary(*(table[start:][:share] for table in model.rotary(model.grid(latents.shape))))
    if swapped and mesh.degree(Axis.CFG) == 2:
        texts = texts[1], texts[0]
    own = [model(latents, timestep, texts[branch], rotary=rotary) for branch in own_branches(mesh, 2)]
    return gather_branches(torch.stack(own), 2, group=mesh.group(Axis.CFG))


def broken_rings(kernels: KernelSet, degree: int) -> dict[str, KernelSet]:
    """Kernels that drop every ring's last chunk, and that lose the log-sum-exp (so that parts count alike)."""
    turns = iter(range(10**6))

    def dropping(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = kernels.attention_lse(q, k, v)
        return (out, lse - torch.inf) if next(turns) % degree == degree - 1 else (out, lse)

    def without_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = kernels.attention_lse(q, k, v)
        return out, torch.zeros_like(lse)

    return {
        "dropped": replace(kernels, attention_lse=dropping),
        "without_lse": replace(kernels, attention_lse=without_lse),
    }


def padding(kernels: KernelSet) -> KernelSet:
    """Self-attention that sees a token of zeros too, as shares padded to one length without a mask would give it."""

    def padded(x: Tensor) -> Tensor:
        return x if x.shape[1] == TEXT else torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))

    return replace(
        kernels,
        attention=lambda q, k, v: kernels.attention(q, padded(k), padded(v)),
        attention_lse=lambda q, k, v: kernels.attention_lse(q, padded(k), padded(v)),
    )


def main(rank: int, world: int, group: dist.ProcessGroup, folder: Path) -> None:
    results: dict[str, Tensor] = {}
    kernels = reference_kernels()
    for cfg, ring, ulysses in layouts(world):
        mesh = build_mesh(group, cfg=cfg, ring=ring, ulysses=ulysses)
        made = {case.name: predict(case, mesh, kernels) for case in CASES}
        made["swapped"] = predict(CASES[-1], mesh, kernels, swapped=True)
        made["wrong_padding"] = predict(CASES[-1], mesh, padding(kernels))
        if ring > 1:
            made |= {name: predict(CASES[-1], mesh, broken) for name, broken in broken_rings(kernels, ring).items()}
        results |= {f"{cfg}x{ring}x{ulysses} {name}": value.contiguous() for name, value in made.items()}
    save_file(results, folder / f"{rank}.safetensors")
