"""One rank of the shared text encoder's tests; `test_encoder_ranks.py` and `test_encoder_gpu.py` start it.

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
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

from safelight.runtime.models.encoders import umt5
from safelight.runtime.models.encoders.qwen2_5_vl import Qwen25VL, SeenPictures, load_qwen2_5_vl
from safelight.runtime.models.encoders.qwen3 import Qwen3, load_qwen3
from safelight.runtime.parallel import tensor
from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh

VOCABULARY, CONTROL, IMAGE = 53, "heads12", 51
HEADS = {"heads3": 3, "heads5": 5, "heads12": 12, "qwen2.5-vl": 3, "qwen3": 5}  # that ranks share
CPU = torch.device("cpu")
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


def build(name: str) -> Any:
    """No size divides by 2 and 4 at once; two heads of queries go with each of keys in Qwen2.5-VL, three in Qwen3."""
    heads = HEADS[name]
    language: dict[str, Any] = {
        "vocab_size": VOCABULARY, "num_hidden_layers": 3, "num_key_value_heads": heads, "intermediate_size": 29,
    }  # fmt: skip
    if name == "qwen2.5-vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        text = language | {"hidden_size": 48, "num_attention_heads": 2 * heads, "rope_parameters": rope}
        vision = {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 48,
            "fullatt_block_indexes": [1], "window_size": 56,
        }  # fmt: skip
        special: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": 48, "vision_start_token_id": 47}
        return Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **special)
        )
    if name == "qwen3":
        return Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=20, num_attention_heads=3 * heads, head_dim=6, tie_word_embeddings=False, **language
            )
        )
    config = UMT5Config(vocab_size=VOCABULARY, d_model=20, d_kv=6, d_ff=29, num_layers=3, num_heads=heads)
    return UMT5EncoderModel(config)


def make(folder: Path) -> None:
    for name, heads in HEADS.items():
        torch.manual_seed(heads)
        module = build(name)
        for parameter in module.parameters():
            spread = (0.2 if "qwen" in name else 0.3) if parameter.ndim > 1 else 0.1
            parameter.data = torch.randn(parameter.shape) * spread + (parameter.ndim == 1)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(module.config.to_json_string(use_diff=False))
        state = {k: v.contiguous() for k, v in module.state_dict().items() if k != "encoder.embed_tokens.weight"}
        save_file(state, folder / name / "model.safetensors")


def load(folder: Path, mesh: ParallelMesh, device: torch.device = CPU) -> Any:
    if folder.name == "qwen2.5-vl":
        return load_qwen2_5_vl(folder, device, torch.float32, mesh, vision=True)
    return (load_qwen3 if folder.name == "qwen3" else umt5.load_umt5)(folder, device, torch.float32, mesh)


def weights(encoder: Any, *parts: str) -> int:
    """Of the parameters that have one of `parts` in their names."""
    named = encoder.module.named_parameters()
    return sum(parameter.numel() for name, parameter in named if any(part in name for part in parts))


def encode(encoder: umt5.UMT5 | Qwen25VL | Qwen3, prompts: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """Qwen2.5-VL sees a picture of 2x2 tokens behind each prompt's first token, which is not read."""
    if not isinstance(encoder, Qwen25VL):
        return encoder.encode(prompts)
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2))
    seen = [(first, *[IMAGE] * 4, *following) for first, *following in prompts]
    return encoder.encode(seen, 1, SeenPictures(pixels, ((2, 2),)))


def encoded(encoder: Any, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix} {name} {number}": row.contiguous()
        for name, prompts in PROMPTS.items()
        for number, row in enumerate(encode(encoder, prompts))
    }


def spoiled(folder: Path, mesh: ParallelMesh) -> dict[str, Tensor]:
    """On two ranks: without the sums over ranks, and with the other rank's heads in the output projections."""
    prompts, results = PROMPTS["guided"], {}
    with mock.patch.object(tensor, "sum_over_ranks", lambda x, *, group: x):
        for name in (CONTROL, "qwen2.5-vl", "qwen3"):
            results[f"unsummed {name}"] = encode(load(folder / name, mesh), prompts)[0]
    right: Any = load(folder / CONTROL, mesh)

    def next_ranks(total: int, *, group: dist.ProcessGroup | None) -> tuple[int, int]:
        assert group is not None
        start, size = tensor.share_of(total, group=group)
        return ((start + size) % total, size) if total == HEADS[CONTROL] else (start, size)

    with mock.patch.object(umt5, "share_of", next_ranks):
        wrong: Any = load(folder / CONTROL, mesh)
    for ours, theirs in zip(right.module.encoder.block, wrong.module.encoder.block, strict=True):
        ours.layer[0].SelfAttention.o.weight = theirs.layer[0].SelfAttention.o.weight
    results[f"swapped {CONTROL}"] = right.encode(prompts)[0]
    return {name: value.contiguous() for name, value in results.items()}


def main(
    rank: int, world: int, group: dist.ProcessGroup, models: Path, folder: Path, device: torch.device = CPU
) -> None:
    results: dict[str, Tensor] = {}
    for tp, sets in ways(world):
        mesh = build_mesh(group, 1, 1, world, encoder=(tp, sets))
        for name, heads in HEADS.items():
            if tp <= heads:
                encoder = load(models / name, mesh, device)
                results |= encoded(encoder, f"{tp}x{sets} {name}")
                results[f"{tp}x{sets} {name} weights"] = torch.tensor(weights(encoder, ""))
        if tp == world == 2 and device == CPU:
            results |= {f"{tp}x{sets} {name}": value for name, value in spoiled(models, mesh).items()}
    save_file(results, folder / f"{rank}.safetensors")
