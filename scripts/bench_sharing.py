#!/usr/bin/env python
"""What ranks gain by sharing a text encoder, and what cutting a joint attention's text sends.

    PYTHONPATH=src python scripts/bench_sharing.py --encoder [--ranks 2] [--device cuda --size xxl]
    PYTHONPATH=src python scripts/bench_sharing.py --joint            # the table of docs/parallelism.md, no model

The encoder has random weights, in the folder for temporary files (xxl, UMT5-XXL: 11.4 GB; qwen, the language model of
Qwen2.5-VL-7B: 14.1 GB). Ways: one rank encodes both prompts;
tp x sets as in configs/encoder_parallel.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkout import commit

from safelight.configs.encoder_parallel import (
    TOKENS,
    EncoderShape,
    EncoderShares,
    choose_encoder_shares,
    encode_seconds,
)
from safelight.configs.parallel import Degrees
from safelight.configs.traffic import StepShape, step_traffic, whole_text_traffic

SIZES = {
    "small": EncoderShape(layers=8, heads=12, width=768, inner=768, d_ff=2048, vocabulary=32128),
    "xxl": EncoderShape(layers=24, heads=64, width=4096, inner=4096, d_ff=10240, vocabulary=256384),
    "qwen": EncoderShape(layers=28, heads=4, width=3584, inner=3584, keys=512, d_ff=18944, vocabulary=152064),
}
JOINT = {  # text tokens, and a step of one state
    "FLUX.1 1024x1024": (512, StepShape(512 + 4096, 24, 128, 57, 64, branches=1)),
    "Qwen-Image 1328x1328": (256, StepShape(256 + 6889, 24, 128, 60, 64, branches=2)),
}


def joint() -> None:
    print("| model, text tokens | ring x ulysses | text cut: MB, rows a rank | text whole: MB, rows a rank |")
    print("|---|---|---|---|")
    for name, (text, shape) in JOINT.items():
        for ring, ulysses in ((1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (2, 4)):
            degrees = Degrees(1, ring, ulysses)
            ranks = range(degrees.world_size)
            cut = max(step_traffic(shape, degrees, rank).total for rank in ranks) / 1e6
            whole = max(whole_text_traffic(shape, text, degrees, rank).total for rank in ranks) / 1e6
            rows, more = -(-shape.tokens // degrees.sp), text + -(-(shape.tokens - text) // degrees.sp)
            print(f"| {name}, {text} | {ring}x{ulysses} | {cut:,.0f}, {rows:,} | {whole:,.0f}, {more:,} |")


def rank_main(rank: int, world: int, folder: str, args: Any, results: Any) -> None:
    import torch
    import torch.distributed as dist

    from safelight.runtime.parallel.mesh import ParallelMesh, build_mesh

    torch.set_num_threads(1)
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    assert dist.group.WORLD is not None
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    prompts = [tuple(range(2, 2 + TOKENS)), tuple(range(3, 3 + TOKENS))]
    ways: list[tuple[int, int] | None] = [None]
    ways += sorted({(tp, sets) for tp in range(1, world + 1) if world % tp == 0 for sets in (1, world // tp)})
    for way in ways:
        mesh = ParallelMesh.single() if way is None else build_mesh(dist.group.WORLD, world, 1, 1, encoder=way)
        encode, held = _loaded(args.size, Path(folder), device, dtype, mesh)
        times = []
        with torch.inference_mode():
            for _ in range(args.runs + 1):
                dist.barrier()
                start = time.perf_counter()
                if way is not None or rank == 0:
                    encode(prompts)
                if args.device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        if rank == 0:
            name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
            results.put((way, statistics.median(times[1:]), held, name))
    dist.destroy_process_group()


def _loaded(size: str, folder: Path, device: Any, dtype: Any, mesh: Any) -> tuple[Callable[[Any], Any], int]:
    """What encodes, and the bytes of its weights on this rank."""
    from safelight.runtime.models.encoders.qwen2_5_vl import load_qwen2_5_vl
    from safelight.runtime.models.encoders.umt5 import load_umt5

    made: Any = (
        load_qwen2_5_vl(folder, device, dtype, mesh, vision=False)
        if size == "qwen"
        else load_umt5(folder, device, dtype, mesh)
    )
    held = sum(p.numel() * p.element_size() for p in made.module.parameters())
    return (lambda prompts: made.encode(prompts, 0)) if size == "qwen" else made.encode, held


def write_encoder(folder: Path, size: str, device: str) -> None:
    import torch
    from safetensors.torch import save_file

    with torch.device("meta"):
        config, module = (_qwen if size == "qwen" else _umt5)(SIZES[size])
    prefix = "model." if size == "qwen" else ""
    names = {prefix + n: p.shape for n, p in module.named_parameters() if n != "encoder.embed_tokens.weight"}
    dtype = torch.float32 if size == "small" else torch.bfloat16
    made = {n: torch.randn(shape, dtype=dtype, device=device).mul_(0.02).cpu() for n, shape in names.items()}
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))


def _umt5(shape: EncoderShape) -> tuple[Any, Any]:
    from transformers.models.umt5.configuration_umt5 import UMT5Config
    from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel

    config = UMT5Config(
        vocab_size=shape.vocabulary, d_model=shape.width, d_kv=shape.inner // shape.heads, d_ff=shape.d_ff,
        num_layers=shape.layers, num_heads=shape.heads,
    )  # fmt: skip
    return config, UMT5EncoderModel(config)


def _qwen(shape: EncoderShape) -> tuple[Any, Any]:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    text = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.layers, "num_attention_heads": 28, "num_key_value_heads": shape.heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text)
    return config, Qwen2_5_VLTextModel(config.text_config)


def encoder(args: Any) -> None:
    shape = SIZES[args.size]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        write_encoder(Path(folder), args.size, args.device)
        ranks = [
            context.Process(target=rank_main, args=(rank, args.ranks, folder, args, results))
            for rank in range(args.ranks)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise SystemExit("a rank failed")
    print(f"{args.size}, {args.ranks} ranks on {args.device}, two prompts of {TOKENS} tokens")
    print("| tp x sets | ms | MB a rank |\n|---|---|---|")
    ways: dict[str, Any] = {}
    while not results.empty():
        way, seconds, held, name = results.get()
        shares = EncoderShares(*way) if way is not None else EncoderShares()
        predicted = round(encode_seconds(shape, shares, args.device) * 1e3, 3)
        label = "one rank" if way is None else f"{way[0]}x{way[1]}"
        ways[label] = {"ms": round(seconds * 1e3, 3), "predicted_ms": predicted, "bytes": held}
        print(f"| {label} | {seconds * 1e3:.1f} | {held / 1e6:,.0f} |")
    chosen: EncoderShares = choose_encoder_shares(None, shape, args.ranks, args.device)
    print(f"chosen without --tp-size: {chosen.tp}x{chosen.sets}")
    facts = {"commit": commit(), "device": name, "size": args.size, "ranks": args.ranks}
    print(json.dumps({**facts, "ways": ways, "chosen": [chosen.tp, chosen.sets]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sharing a text encoder, and a joint attention's text.")
    parser.add_argument("--encoder", action="store_true", help="measure every way of sharing a text encoder")
    parser.add_argument("--joint", action="store_true", help="print bytes and rows of both ways to keep text")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    args = parser.parse_args()
    if args.joint:
        joint()
    if args.encoder:
        encoder(args)
    if not (args.joint or args.encoder):
        parser.error("one of --encoder and --joint is needed")


if __name__ == "__main__":
    main()
