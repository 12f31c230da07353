"""Trains the autoencoder from nothing on composed scenes, images and clips by turns.

Usage: python -m train_builtin_model.train_vae --sprites work/sprites.npz --out work --max-minutes 3
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from train_builtin_model.checkpoint import prefixed, save_checkpoint
from train_builtin_model.clip_vae import ClipVae
from train_builtin_model.compose import Compositor
from train_builtin_model.loader import Block, SceneBlocks, start_loader
from train_builtin_model.models import make_vae

LEARNING_RATE = 2.5e-3
KL_WEIGHT = 4e-4
EMA = 0.998


def reconstruction_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on pixels, on differences of neighbours (sharp edges) and on 4x4 means (right colours)."""
    out, target = out.float(), target.float()
    error = out - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    coarse = F.avg_pool3d(error, (1, 4, 4)).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + coarse


def learning_rate(progress: float) -> float:
    """Short warm-up, constant, then linear to a fiftieth over the second half."""
    return LEARNING_RATE * min(1.0, progress / 0.02 + 0.02, 2.0 * (1.0 - progress) + 0.02)


@torch.no_grad()
def latent_statistics(
    clip_vae: ClipVae, compositor: Compositor, blocks: Iterator[Block], device: torch.device, count: int
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every latent channel, over `count` blocks."""
    sums = squares = torch.zeros((), device=device)
    for _ in range(count):
        block = next(blocks)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, _ = clip_vae.encode(compositor.render(block.scenes.to(device), block.frames))
        sums = sums + mean.mean(dim=(0, 2, 3, 4)) / count
        squares = squares + mean.square().mean(dim=(0, 2, 3, 4)) / count
    return sums.tolist(), (squares - sums.square()).clamp_min(1e-6).sqrt().tolist()


def train(args: argparse.Namespace) -> None:
    """The loop: stops by the clock, keeps an average of the weights, saves it with the latent statistics."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    sprites = np.load(args.sprites)
    # Workers fork before the first use of the GPU in this process.
    data = SceneBlocks(sprites["clash"], args.images, args.videos, 0.5, args.seed)
    blocks = start_loader(data, args.workers)
    next(blocks)
    compositor = Compositor(sprites["rgba"], device, torch.bfloat16 if on_gpu else torch.float32)
    vae = make_vae().to(device)
    average = make_vae().to(device).requires_grad_(False)
    average.load_state_dict(vae.state_dict())
    clip_vae = ClipVae(vae, fuse=on_gpu)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=on_gpu)
    start, step, history, running = time.monotonic(), 0, [], torch.zeros(2, device=device)
    while (progress := (time.monotonic() - start) / (60 * args.max_minutes)) < 1 and step < args.max_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        block = next(blocks)
        video = compositor.render(block.scenes.to(device), block.frames)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            mean, log_variance = clip_vae.encode(video)
            latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            out = clip_vae.decode(latents)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        reconstruction = reconstruction_loss(out, video)
        loss = reconstruction + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(list(average.parameters()), parameters, 1 - min(EMA, (step + 1) / (step + 10)))
        running += torch.stack([reconstruction.detach(), kl.detach()])
        step += 1
        if step % args.log_every == 0:
            values = (running / args.log_every).tolist()
            running.zero_()
            history.append([step, round(time.monotonic() - start, 1), *(round(v, 5) for v in values)])
            print(f"vae step {step} {history[-1][1]} s: reconstruction {values[0]:.4f}, kl {values[1]:.3f}", flush=True)
    fused = ClipVae(average, fuse=False)
    mean_list, std_list = latent_statistics(fused, compositor, blocks, device, args.statistics)
    meta = {"latents_mean": mean_list, "latents_std": std_list, "history": history, "steps": step}
    save_checkpoint(args.out, "vae", prefixed("vae", dict(average.state_dict())), meta)
    print(f"vae: {step} steps, latent std {min(std_list):.3f} to {max(std_list):.3f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-minutes", type=float, default=3.0)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--images", type=int, default=160, help="images in a batch")
    parser.add_argument("--videos", type=int, default=10, help="clips in a batch")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--statistics", type=int, default=40, help="batches over which latent statistics are taken")
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
