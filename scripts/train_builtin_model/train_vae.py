"""Trains the autoencoder from nothing on composed scenes, images and clips by turns.

Usage: python -m train_builtin_model.train_vae --sprites work/sprites.npz --out work --max-minutes 3
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn

from train_builtin_model.checkpoint import load_checkpoint, prefixed, save_checkpoint, with_prefix
from train_builtin_model.clip_vae import ClipVae
from train_builtin_model.compose import Compositor
from train_builtin_model.loader import Block, SceneBlocks, start_loader
from train_builtin_model.models import initialise_vae, make_vae
from train_builtin_model.muon import Muon

ADAM_RATE, MUON_RATE, WARM_UP_STEPS = 2e-3, 0.02, 30
KL_WEIGHT = 2e-3
EMA = 0.995


def reconstruction_loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on pixels, on differences of neighbours (sharp edges) and on 4x4 means (right colours)."""
    out, target = out.float(), target.float()
    error = out - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    coarse = F.avg_pool3d(error, (1, 4, 4)).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + coarse


def rate_factor(progress: float, step: int) -> float:
    """Warm-up, constant, then linear to a fiftieth over the second half."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, 0.02 + 1.96 * (1.0 - progress))


def split_parameters(vae: AutoencoderKLWan) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """-> (filters, for Muon; the rest, with the first and last layers, for AdamW)."""
    filters: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in vae.named_parameters():
        if not parameter.requires_grad:
            continue
        outer = "encoder.conv_in" in name or "decoder.conv_out" in name or "quant_conv" in name
        inner = parameter.ndim >= 4 and parameter.shape[0] > 3 and "gamma" not in name and not outer
        (filters if inner else others).append(parameter)
    return filters, others


def random_crop(video: torch.Tensor, size: int, rng: random.Random) -> torch.Tensor:
    """(B, 3, F, 128, 128) -> (B, 3, F, size, size), one window for the batch, on the grid of latents."""
    y, x = (8 * rng.randrange((video.shape[-1] - size) // 8 + 1) for _ in range(2))
    return video[..., y : y + size, x : x + size]


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


class Trainer:
    """Model, average, optimisers and log of one part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"
        torch.manual_seed(args.seed)
        sprites = np.load(args.sprites)
        self.vae, self.meta = self._make_model()
        # Workers fork before the first use of the GPU in this process.
        data = SceneBlocks(sprites["clash"], args.images, args.videos, 0.5, args.seed + self.meta["steps"])
        self.blocks = start_loader(data, args.workers)
        next(self.blocks)
        self.vae.to(self.device)
        self.average = copy.deepcopy(self.vae).requires_grad_(False)
        self.average_parameters, self.parameters = list(self.average.parameters()), list(self.vae.parameters())
        self.compositor = Compositor(sprites["rgba"], self.device, torch.bfloat16 if self.on_gpu else torch.float32)
        self.clip_vae = ClipVae(self.vae, fuse=self.on_gpu)
        if args.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        filters, others = split_parameters(self.vae)
        self.muon = Muon(filters)
        self.adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=self.on_gpu)
        self.random = random.Random(args.seed)

    def _make_model(self) -> tuple[AutoencoderKLWan, dict[str, Any]]:
        vae = make_vae()
        initialise_vae(vae)
        if not self.args.resume:
            return vae, {"history": [], "steps": 0, "seconds": 0.0}
        weights, meta = load_checkpoint(self.args.out, "vae")
        vae.load_state_dict(with_prefix("vae", weights))
        return vae, meta

    def step(self, index: int, progress: float) -> torch.Tensor:
        """One update. -> (reconstruction loss, KL), on the device."""
        block = next(self.blocks)
        video = self.compositor.render(block.scenes.to(self.device), block.frames)
        video = random_crop(video, self.args.crop, self.random)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            mean, log_variance = self.clip_vae.encode(video)
            out = self.clip_vae.decode(mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        reconstruction = reconstruction_loss(out, video)
        self.vae.zero_grad(set_to_none=True)
        (reconstruction + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        factor = rate_factor(progress, index)
        self.adam.param_groups[0]["lr"] = ADAM_RATE * factor
        self.adam.step()
        self.muon.step(MUON_RATE * factor)
        torch._foreach_lerp_(self.average_parameters, self.parameters, 1 - min(EMA, (index + 1) / (index + 10)))
        return torch.stack([reconstruction.detach(), kl.detach()])

    def run(self) -> None:
        """Until the clock says stop; then the latent statistics."""
        args, start, index = self.args, time.monotonic(), 0
        begin, end = args.schedule
        running, saved = torch.zeros(2, device=self.device), time.monotonic()
        while (share := (time.monotonic() - start) / (60 * args.max_minutes)) < 1 and index < args.max_steps:
            running += self.step(index, begin + (end - begin) * share)
            index += 1
            if index % args.log_every == 0:
                values, seconds = (running / args.log_every).tolist(), time.monotonic() - start
                running.zero_()
                row = [
                    self.meta["steps"] + index,
                    round(self.meta["seconds"] + seconds, 1),
                    *(round(v, 5) for v in values),
                ]
                self.meta["history"].append(row)
                print(f"vae step {row[0]} {row[1]} s: reconstruction {row[2]:.4f}, kl {row[3]:.3f}", flush=True)
            if time.monotonic() - saved > args.save_seconds:
                self.save()
                saved = time.monotonic()
        self.meta["steps"] += index
        self.meta["seconds"] += time.monotonic() - start
        if not args.decoder_only:
            average = ClipVae(self.average, fuse=False)
            mean, std = latent_statistics(average, self.compositor, self.blocks, self.device, args.statistics)
            self.meta.update(latents_mean=mean, latents_std=std)
        self.save()
        print(
            f"vae: {self.meta['steps']} steps, latent std {[round(s, 2) for s in self.meta['latents_std']]}", flush=True
        )

    def save(self) -> None:
        """The averaged weights and the log."""
        save_checkpoint(self.args.out, "vae", prefixed("vae", dict(self.average.state_dict())), self.meta)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--max-minutes", type=float, default=3.0)
    parser.add_argument("--schedule", type=float, nargs=2, default=(0.0, 1.0), help="progress at start and end")
    parser.add_argument(
        "--decoder-only", action="store_true", help="with --resume: leave encoder and latents as they are"
    )
    parser.add_argument("--crop", type=int, default=128, help="train on windows of this size, a multiple of 8")
    parser.add_argument("--save-seconds", type=float, default=60.0)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--images", type=int, default=32, help="images in a batch")
    parser.add_argument("--videos", type=int, default=2, help="clips in a batch")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--statistics", type=int, default=100, help="batches over which latent statistics are taken")
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
