"""One rank of the shared text encoder's tests; `test_encoder_ranks.py` starts it.

Encodes every case with every way of sharing that its number of ranks allows, and writes this rank's results to
FOLDER/RANK.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from safelight.runtime.models.encoders import umt5
from safelight.runtime.parallel import tensor
from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh

VOCABULARY, CONTROL = 53, "heads12"
HEADS = {"heads3": 3, "heads5": 5, "heads12": 12}
PROMPTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "guided": ((7, 52, 9, 30, 1), (4, 1)),
    "unguided": ((3, 8, 50, 11, 26, 20, 1),),
    "three": ((2, 1), (40, 33, 21, 17, 1), (1,)),
}


def ways(world: int) -> Iterator[tuple[int, int]]:
    """Every (tp, sets)."""
    for tp in range(1, world + 1):
        if world % tp == 0:
            yield from sorted({(tp, 1), (tp, world // tp)})


def make(folder: Path) -> None:
    """An encoder for each number of heads; no size divides by 2 and 4 at once."""
    for name, heads in HEADS.items():
        torch.manual_seed(heads)
        config = UMT5Config(vocab_size=VOCABULARY, d_model=20, d_kv=6, d_ff=29, num_layers=3, num_heads=heads)
        module = UMT5EncoderModel(config)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.1) + (parameter.ndim == 1)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config.to_json_string(use_diff=False))
        state = {k: v.contiguous() for k, v in module.state_dict().items() if k != "encoder.embed_tokens.weight"}
        save_file(state, folder / name / "model.safetensors")


def load(folder: Path, mesh: ParallelMesh) -> umt5.UMT5:
    return umt5.load_umt5(folder, torch.device("cpu"), torch.float32, mesh)


def weights(encoder: umt5.UMT5) -> int:
    return sum(parameter.numel() for parameter in encoder.module.parameters())


def encoded(encoder: umt5.UMT5, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix} {name} {number}": row.contiguous()
        for name, prompts in PROMPTS.items()
        for number, row in enumerate(encoder.encode(prompts))
    }


def spoiled(folder: Path, mesh: ParallelMesh) -> dict[str, Tensor]:
    """On two ranks: without the sums over ranks, and with the other rank's heads in the output projections."""
    prompts, results = PROMPTS["guided"], {}
    with mock.patch.object(tensor, "sum_over_ranks", lambda x, *, group: x):
        results["unsummed"] = load(folder, mesh).encode(prompts)[0]
    right: Any = load(folder, mesh)

    def next_ranks(total: int, *, group: dist.ProcessGroup | None) -> tuple[int, int]:
        assert group is not None
        start, size = tensor.share_of(total, group=group)
        return ((start + size) % total, size) if total == HEADS[CONTROL] else (start, size)

    with mock.patch.object(umt5, "share_of", next_ranks):
        wrong: Any = load(folder, mesh)
    for ours, theirs in zip(right.module.encoder.block, wrong.module.encoder.block, strict=True):
        ours.layer[0].SelfAttention.o.weight = theirs.layer[0].SelfAttention.o.weight
    results["swapped"] = right.encode(prompts)[0]
    return {name: value.contiguous() for name, value in results.items()}


def main(rank: int, world: int, group: dist.ProcessGroup, models: Path, folder: Path) -> None:
    results: dict[str, Tensor] = {}
    for tp, sets in ways(world):
        mesh = build_mesh(group, 1, 1, world, encoder=(tp, sets))
        for name, heads in HEADS.items():
            if tp <= heads:
                encoder = load(models / name, mesh)
                results |= encoded(encoder, f"{tp}x{sets} {name}")
                results[f"{tp}x{sets} {name} weights"] = torch.tensor(weights(encoder))
        if tp == world == 2:
            results |= {f"{tp}x{sets} {name}": value for name, value in spoiled(models / CONTROL, mesh).items()}
    save_file(results, folder / f"{rank}.safetensors")
