"""What `bench_parallel.py` measures. Every rank runs every case; rank 0's result counts.

A case returns figures for one JSON line, `{"skipped": why}`, or raises.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from parallel_images import images
from parallel_links import links
from parallel_models import (
    GuidedStep,
    diffusers_transformer,
    random_weights,
    step_numbers,
    transformer,
    wan_config,
    wan_vae,
)
from parallel_plan import Case
from parallel_ranks import World
from torch import Tensor

from safelight.configs.parallel import Degrees
from safelight.configs.parallel_costs import H200, predict
from safelight.configs.traffic import step_traffic
from safelight.kernels.dispatch import reference_kernels
from safelight.runtime.models.vae.wan import DecodeCursor, WanVae
from safelight.runtime.models.wan.transformer import WanConfig, WanText, WanTransformer
from safelight.runtime.models.wan.weights import parameter_dtype
from safelight.runtime.parallel.cfg import gather_branches, own_branches
from safelight.runtime.parallel.mesh import Axis, ParallelMesh

TRACED_MS = 2000.0  # of a step whose every layer is traced; longer ones are traced in part
CHECKS = (  # heads, latent frames, height and width: uneven tokens, uneven heads and fewer tokens than ranks, even
    (12, (3, 30, 26)),
    (5, (1, 2, 6)),
    (8, (4, 16, 16)),
)


def step(world: World, case: Case) -> dict[str, Any]:
    """One guided step of the pipeline. One rank: every rank alone, and the fastest counts."""
    settings, degrees = world.settings, case.degrees
    shape, tflop = step_numbers(case.model, case.size, settings.frames, settings.tiny)
    expected = predict(shape, tflop, degrees, H200).seconds
    left = settings.until - time.time()
    if world.peers.exchange(left)[0] < 1.5 * expected + 5 and world.device.type == "cuda":
        return {"skipped": f"{left:.0f} s are left, a step takes about {expected:.1f} s"}
    config, mesh = wan_config(case.model, settings.tiny), world.mesh(degrees)
    weights = world.keep(f"wan {case.model}", lambda: random_weights(config, world.dtype, world.device))
    world.forget_peak()
    model = transformer(config, weights, mesh, world.kernels, world.device)
    guided = GuidedStep(model, mesh, world.device, case.size, settings.frames)
    guided(1)  # one layer has every kernel and every collective
    world.wait()
    figures = world.median(guided, min if degrees.world_size == 1 else max)
    layers = max(1, min(config.num_layers, int(config.num_layers * TRACED_MS / figures["ms"])))
    sent = [step_traffic(shape, degrees, rank).total for rank in range(degrees.world_size)]
    return {
        **figures,
        "tokens": shape.tokens,
        "predicted_ms": round(expected * 1e3, 1),
        "sent_mb": round(max(sent) / 1e6, 2),
        "memory_gib": round(world.peak_bytes() / 2**30, 1),
        "traced_layers": layers,
        "trace": world.trace(partial(guided, layers)),
    }


def check(world: World, case: Case) -> dict[str, Any]:
    """Every layout's prediction against one rank's: bfloat16 by its distance from float32, float32 by its largest
    error."""
    found: dict[str, Any] = {"ok": True}
    for heads, size in CHECKS:
        config = WanConfig(heads, 128 if world.device.type == "cuda" else 12, 16, 16, 64, 64, 1024, 3)
        inputs = _check_inputs(size, world.device)
        exact = _prediction(world, config, Degrees(), torch.float32, inputs, plain=True)
        half = torch.bfloat16
        alone = _distance(_prediction(world, config, Degrees(), half, inputs), exact)
        whole = _prediction(world, config, Degrees(), torch.float32, inputs)
        each: dict[str, Any] = {"alone": {"bf16_l2": alone, "fp32_max": _largest(whole, exact)}}
        for layout in case.layout.split(","):
            degrees = Case("check", layout=layout).degrees
            bf16 = _distance(_prediction(world, config, degrees, half, inputs), exact)
            fp32 = _largest(_prediction(world, config, degrees, torch.float32, inputs), whole)
            worst = [max(values) for values in zip(*world.peers.exchange([bf16, fp32]), strict=True)]
            good = worst[0] <= 2 * alone
            each[layout] = {"bf16_l2": worst[0], "fp32_max": worst[1], "ok": good}
            found["ok"] = found["ok"] and good
        found[f"heads {heads}, {size[0] * size[1] * size[2] // 4} tokens"] = each
    return found


def _check_inputs(size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(3)
    latents = torch.randn(1, 16, *size, generator=generator, device=device)
    return (
        latents,
        torch.full((1,), 500.0, device=device),
        torch.randn(2, 1, 64, 64, generator=generator, device=device),
    )


def _prediction(
    world: World, config: WanConfig, degrees: Degrees, dtype: torch.dtype, inputs: tuple[Tensor, Tensor, Tensor], *,
    plain: bool = False,
) -> Tensor:  # fmt: skip
    """Both branches, float32 (2, 1, C, F, h, w)."""
    mesh, kernels = world.mesh(degrees), reference_kernels() if plain else world.kernels
    whole = random_weights(config, torch.float32, world.device)
    weights = {name: value.to(parameter_dtype(name, dtype)) for name, value in whole.items()}
    model = transformer(config, weights, mesh, kernels, world.device)
    latents, timestep, texts = inputs
    own = [model(latents, timestep, WanText(texts[branch])).float() for branch in own_branches(mesh, 2)]
    return gather_branches(torch.stack(own), 2, group=mesh.group(Axis.CFG))


def diffusers(world: World, case: Case) -> dict[str, Any]:
    """diffusers' own context parallelism: the two forwards of a guided step, one after the other as its pipeline."""
    from diffusers import ContextParallelConfig

    settings, degrees = world.settings, case.degrees
    config = wan_config(case.model, settings.tiny)
    world.kept.clear()
    model = diffusers_transformer(config, world.device, world.dtype)
    tokens = step_numbers(case.model, case.size, settings.frames, settings.tiny)[0].tokens
    if world.device.type == "cuda":
        model.set_attention_backend("_native_cudnn")
    if degrees.world_size > 1:
        uneven = tokens % degrees.sp > 0 or config.num_attention_heads % degrees.ulysses > 0
        context = ContextParallelConfig(
            ring_degree=degrees.ring, ulysses_degree=degrees.ulysses,
            ulysses_anything=uneven and degrees.ring == 1, ring_anything=uneven and degrees.ulysses == 1,
        )  # fmt: skip
        model.enable_parallelism(config=context)
    ours = GuidedStep(_nothing(config, world), ParallelMesh.single(), world.device, case.size, settings.frames).state
    latents, time_ = ours.latents[None].to(world.dtype), torch.full((1,), 500.0, device=world.device)
    texts = [ours.conditioning.branch(branch)[None].to(world.dtype) for branch in (0, 1)]

    def guided() -> None:
        for text in texts:
            model(latents, time_, text, return_dict=False)

    guided()
    world.wait()
    figures = world.median(guided, min if degrees.world_size == 1 else max)
    return {**figures, "tokens": tokens, "trace": world.trace(guided)}


def _nothing(config: WanConfig, world: World) -> WanTransformer:
    """A transformer without weights, for what inputs need to know of it."""
    with torch.device("meta"):
        return WanTransformer(config, ParallelMesh.single(), world.kernels).to(world.dtype)


def vae(world: World, case: Case) -> dict[str, Any]:
    """Decoding on every rank alone and shared, and the largest difference of 8-bit values between the two."""
    settings = world.settings
    world.kept.clear()
    module, mean, inverse_std = wan_vae(world.device, world.dtype, settings.tiny)
    height, width = (8, 12) if settings.tiny else (60, 104)
    generator = torch.Generator(world.device).manual_seed(4)
    frames = (settings.vae_frames - 1) // 4 + 1
    latents = torch.randn(mean.shape[1], frames, height, width, generator=generator, device=world.device)
    found: dict[str, Any] = {"frames": settings.vae_frames, "size": f"{8 * width}x{8 * height}"}
    pictures: dict[str, Tensor] = {}
    for name, group in (("alone", None), ("shared", world.group)):
        decode = partial(_decode, WanVae(module, mean, inverse_std, group), latents)
        pictures[name] = decode()
        figures = world.median(decode, min if group is None else max)
        found |= {f"{name}_{key}": value for key, value in figures.items()}
    difference = (pictures["alone"].int() - pictures["shared"].int()).abs()
    worst = world.peers.exchange([int(difference.max()), float(difference.float().mean())])
    found |= {"largest_difference": max(w[0] for w in worst), "mean_difference": max(w[1] for w in worst)}
    unclipped = (pictures["alone"] > 0) & (pictures["alone"] < 255)
    return found | {"unclipped": round(float(unclipped.float().mean()), 3), "trace": world.trace(decode)}


def _decode(vae: WanVae, latents: Tensor) -> Tensor:
    cursor: DecodeCursor | None = None
    parts: list[Tensor] = []
    while not parts or cursor is not None:
        part, cursor = vae.decode(latents, cursor)
        parts.append(part)
    return torch.cat(parts)


def _distance(made: Tensor, exact: Tensor) -> float:
    return float((made - exact).norm() / exact.norm())


def _largest(made: Tensor, exact: Tensor) -> float:
    return float((made - exact).abs().max())


CASES: dict[str, Callable[[World, Case], dict[str, Any]]] = {
    "check": check, "step": step, "links": links, "diffusers": diffusers, "vae": vae,
    "images": images,
}  # fmt: skip
