"""One rank of the joint attention's tests; `test_joint_ranks.py` starts it.

Two double-stream blocks over text and image tokens, on every layout of the number of ranks; this rank's results, whole,
go to FOLDER/RANK.safetensors.
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
from safelight.runtime.layers.attention import JointAttention
from safelight.runtime.layers.rope import Rotary, joint_rotary
from safelight.runtime.parallel.joint import JointShare
from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh
from safelight.runtime.parallel.sequence import SequenceGroups

HEAD_DIM, LAYERS = 8, 2


@dataclass(frozen=True, slots=True)
class Case:
    heads: int
    text: int
    image: int
    batch: int

    @property
    def name(self) -> str:
        return f"heads{self.heads}_text{self.text}_image{self.image}_b{self.batch}"


CASES = (
    Case(3, 1, 11, 1),
    Case(3, 7, 20, 3),
    Case(5, 33, 9, 1),  # more text than image: with four ranks three of them have no image, or little
    Case(5, 7, 1, 3),
    Case(12, 33, 45, 1),
    Case(12, 7, 64, 3),
    Case(5, 0, 13, 1),
    Case(3, 1, 1, 1),  # two tokens: with four ranks two of them have none
    Case(12, 8, 24, 1),  # equal shares on every layout
)


def layouts(world: int) -> Iterator[tuple[int, int]]:
    """Every (ring, ulysses) of `world` ranks."""
    yield from ((ring, world // ring) for ring in range(1, world + 1) if world % ring == 0)


def table(case: Case) -> Rotary:
    """Angles of all tokens, text first."""
    angles = torch.outer(torch.arange(case.text + case.image) * 0.7, torch.linspace(1.0, 0.1, HEAD_DIM // 2))
    return Rotary(angles.cos(), angles.sin())


def attend(case: Case, mesh: ParallelMesh, kernels: KernelSet, *, swapped: bool = False) -> tuple[Tensor, Tensor]:
    """(B, T, E) and (B, S, E) after the blocks; `swapped`: text and image tokens use each other's weights."""
    groups, width = SequenceGroups.of(mesh), case.heads * HEAD_DIM
    share = JointShare.of(groups, case.text, case.image)
    g = torch.Generator().manual_seed(case.heads)
    whole = (
        torch.randn(case.batch, case.text, width, generator=g),
        torch.randn(case.batch, case.image, width, generator=g),
    )
    text, image = share.shard(*whole)
    texts, images = (Rotary(*(t[part] for t in table(case))) for part in (slice(case.text), slice(case.text, None)))
    rotary = joint_rotary(texts, images, share)
    for _ in range(LAYERS):
        layer = JointAttention(width, case.heads, 1e-6, kernels, groups=groups)
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            parameter.data = 1 + 0.1 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5
        if swapped:
            layer.qkv, layer.text_qkv = layer.text_qkv, layer.qkv
        added = layer(text, image, rotary, share)
        text, image = text + added[0], image + added[1]
    texts, images = share.gather(torch.cat([text, image], dim=1))
    assert torch.equal(share.gather_image(image), images)
    return texts.contiguous(), images.contiguous()


def padding(kernels: KernelSet) -> KernelSet:
    """Kernels that attend to a row of zeros too, as unmasked padding to equal shares would."""

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))

    return replace(
        kernels,
        attention=lambda q, k, v: kernels.attention(q, padded(k), padded(v)),
        attention_lse=lambda q, k, v: kernels.attention_lse(q, padded(k), padded(v)),
    )


def main(rank: int, world: int, group: dist.ProcessGroup, folder: Path) -> None:
    results: dict[str, Tensor] = {}
    kernels, last = reference_kernels(), CASES[-1]
    for ring, ulysses in layouts(world):
        mesh, prefix = build_mesh(group, cfg=1, ring=ring, ulysses=ulysses), f"{ring}x{ulysses}"
        made = {case.name: attend(case, mesh, kernels) for case in CASES}
        made["wrong_weights"] = attend(last, mesh, kernels, swapped=True)
        made["wrong_padding"] = attend(last, mesh, padding(kernels))
        for name, (text, image) in made.items():
            results |= {f"{prefix} {name} text": text, f"{prefix} {name} image": image}
    save_file(results, folder / f"{rank}.safetensors")
