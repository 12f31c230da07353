"""Trains the autoencoder from nothing on composed scenes; every step has images and clips.

Usage: python -m train_builtin_model.train_vae --sprites work/sprites.npz --out work --max-minutes 4

Clips have 17 frames: the autoencoder is causal, so all shorter clips are beginnings of these.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import nn

from train_builtin_model.bank import PixelBank
from train_builtin_model.checkpoint import load_checkpoint, prefixed, save_checkpoint, with_prefix
from train_builtin_model.clip_vae import ClipVae
from train_builtin_model.compose import RESOLUTION, Compositor
from train_builtin_model.loader import SceneBlocks, start_loader
from train_builtin_model.models import initialise_vae, make_vae
from train_builtin_model.steps import DEFAULT_FORMS, FORMS, StepRunner
from train_builtin_model.update import Updater, check_finite

ADAM_RATE, MUON_RATE, WARM_UP_STEPS = 2e-3, 0.02, 100
KL_WEIGHT = 2e-3
EMA = 0.998
CLIP = 17
CAPACITY, SMALL_CAPACITY = {1: 60_000, CLIP: 6_000}, {1: 500, CLIP: 30}


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


class Trainer:
    """Model, average, optimisers, pictures and log of one part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"
        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True
        sprites = np.load(args.sprites)
        self.vae, self.meta = self._make_model()
        # Workers fork before the first use of the GPU in this process.
        seed = args.seed + self.meta["steps"]
        data = SceneBlocks(sprites["clash"], 4 * args.images, args.videos, 0.6, seed, lengths=(CLIP,))
        blocks = start_loader(data, args.workers)
        next(blocks)
        self.vae.to(self.device)
        self.average = copy.deepcopy(self.vae).requires_grad_(False)
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        compositor = Compositor(sprites["rgba"], self.device, self.dtype)
        self.bank = PixelBank(compositor, blocks, self.device, CAPACITY if self.on_gpu else SMALL_CAPACITY)
        self.clip_vae = ClipVae(self.vae, fuse=False)
        if args.decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)
        self.update = Updater(self.vae, self.average, *split_parameters(self.vae), ADAM_RATE, MUON_RATE)
        self.losses = torch.zeros(3, device=self.device)  # sums of reconstruction and KL; steps
        self.runner = StepRunner({CLIP: self.body}, self.clip_vae.use_fusion, self.take_loss, self.device, seed)

    def _make_model(self) -> tuple[AutoencoderKLWan, dict[str, Any]]:
        vae = make_vae()
        initialise_vae(vae)
        if not self.args.resume:
            return vae, {"history": [], "steps": 0, "seconds": 0.0}
        weights, meta = load_checkpoint(self.args.out, "vae")
        vae.load_state_dict(with_prefix("vae", weights))
        return vae, meta

    def loss(self, video: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """-> (2,): reconstruction loss, KL."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            mean, log_variance = self.clip_vae.encode(video)
            noise = torch.randn(mean.shape, device=self.device, generator=generator)
            out = self.clip_vae.decode(mean + noise * (0.5 * log_variance).exp())
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        return torch.stack([reconstruction_loss(out, video), kl])

    def body(self, generator: torch.Generator) -> None:
        """One whole step: half of the loss from windows of images, half from windows of clips."""
        args, rings = self.args, self.bank.rings
        images = rings[1].batch(args.images, args.crop, self.dtype, generator)
        clips = rings[CLIP].batch(args.videos, args.crop, self.dtype, generator)
        parts = (self.loss(images, generator) + self.loss(clips, generator)) / 2
        self.update.step(parts[0] + KL_WEIGHT * parts[1])
        self.losses[:2] += parts.detach()
        self.losses[2] += 1

    def take_loss(self) -> float:
        """Mean reconstruction loss since the last call; waits for the GPU."""
        return self.take_losses()[0]

    def take_losses(self) -> tuple[float, float]:
        """Mean reconstruction loss and KL since the last call; waits for the GPU."""
        reconstruction, kl, steps = self.losses.tolist()
        self.losses.zero_()
        return reconstruction / max(steps, 1.0), kl / max(steps, 1.0)

    def prepare(self) -> None:
        """Fill the bank and choose the form of the step; weights stay as they are."""
        self.block_seconds = self.bank.fill(self.args.fill_seconds)
        self.update.schedule(0.0, 0.0)
        form = self.runner.choose(self.args.forms)
        self.update.reset()
        print(f"vae: form {form}", flush=True)

    def run(self) -> None:
        """Until the clock says stop; then the latent statistics."""
        args, start = self.args, time.monotonic()
        self.prepare()
        begin, end = args.schedule
        index, saved, refilled, begun = 0, time.monotonic(), 0.0, time.monotonic()
        seconds = max(1.0, start + 60 * args.max_minutes - begun)
        while index < args.max_steps:
            share = min(1.0, (time.monotonic() - begun) / seconds)
            if share == 1 and index >= args.min_steps:
                break
            factor = rate_factor(begin + (end - begin) * share, index)
            self.update.schedule(factor, 1 - min(EMA, (index + 1) / (index + 10)))
            self.runner(CLIP)
            index += 1
            if refilled < args.refill_share * (time.monotonic() - begun):
                before = time.monotonic()
                self.bank.refill()
                refilled += max(time.monotonic() - before, self.block_seconds)
            if index % args.log_every == 0:
                self._log(index, time.monotonic() - start)
            if time.monotonic() - saved > args.save_seconds:
                self.save()
                saved = time.monotonic()
        self.meta["steps"] += index
        self.meta["seconds"] += time.monotonic() - start
        if not args.decoder_only:
            self.meta["latents_mean"], self.meta["latents_std"] = self.latent_statistics(args.statistics)
        self.save()
        spread = [round(s, 2) for s in self.meta["latents_std"]]
        print(f"vae: {self.meta['steps']} steps ({int(self.update.skipped)} skipped), latent std {spread}", flush=True)

    def _log(self, index: int, seconds: float) -> None:
        values = [round(v, 5) for v in self.take_losses()]
        row = [self.meta["steps"] + index, round(self.meta["seconds"] + seconds, 1), *values]
        self.meta["history"].append(row)
        print(f"vae step {row[0]} {row[1]} s: reconstruction {row[2]:.4f}, kl {row[3]:.3f}", flush=True)
        check_finite("vae", sum(row))

    @torch.no_grad()
    def latent_statistics(self, count: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of every latent channel, over `count` batches of whole pictures."""
        average = ClipVae(self.average, fuse=False)
        sums = squares = torch.zeros((), device=self.device)
        for index in range(count):
            frames, size = ((1, 32), (CLIP, 4))[index % 2]
            video = self.bank.rings[frames].batch(size, RESOLUTION, self.dtype, self.runner.generator)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
                mean, _ = average.encode(video)
            sums = sums + mean.mean(dim=(0, 2, 3, 4)) / count
            squares = squares + mean.square().mean(dim=(0, 2, 3, 4)) / count
        return sums.tolist(), (squares - sums.square()).clamp_min(1e-6).sqrt().tolist()

    def save(self) -> None:
        """The averaged weights and the log."""
        save_checkpoint(self.args.out, "vae", prefixed("vae", dict(self.average.state_dict())), self.meta)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--max-minutes", type=float, default=4.0, help="all of it, but for start-up and statistics")
    parser.add_argument("--schedule", type=float, nargs=2, default=(0.0, 1.0), help="progress at start and end")
    parser.add_argument(
        "--decoder-only", action="store_true", help="with --resume: encoder and latents stay as they are"
    )
    parser.add_argument("--crop", type=int, default=64, help="train on windows of this size, a multiple of 8")
    parser.add_argument("--images", type=int, default=128, help="images in a batch")
    parser.add_argument("--videos", type=int, default=16, help="clips in a batch")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=DEFAULT_FORMS)
    parser.add_argument("--fill-seconds", type=float, default=10.0)
    parser.add_argument("--refill-share", type=float, default=0.08, help="of the time, for fresh scenes")
    parser.add_argument("--save-seconds", type=float, default=60.0)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--min-steps", type=int, default=0, help="even when the time is over")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--statistics", type=int, default=60, help="batches over which latent statistics are taken")
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
