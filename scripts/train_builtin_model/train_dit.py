"""Trains the text encoder and the transformer together, by flow matching in the latent space of the trained VAE.

Usage: python -m train_builtin_model.train_dit --sprites work/sprites.npz --out work --max-minutes 5 --schedule 0 0.45
       and later, with --resume, --schedule 0.45 1

A part starts from the averaged weights of the part before; optimiser moments start anew, with a short warm-up.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from train_builtin_model.bank import LatentBank
from train_builtin_model.checkpoint import load_checkpoint, save_checkpoint, with_prefix
from train_builtin_model.clip_vae import ClipVae
from train_builtin_model.compose import Compositor
from train_builtin_model.denoiser import Denoiser, draw_sigma, drop_captions
from train_builtin_model.loader import CAPTION_TOKENS, SceneBlocks, start_loader
from train_builtin_model.models import initialise_transformer, make_text_encoder, make_transformer, make_vae
from train_builtin_model.muon import Muon
from train_builtin_model.tokenizer import build_tokenizer
from train_builtin_model.vocab import load_vocabulary

ADAM_RATE, MUON_RATE, WARM_UP_STEPS = 1.5e-3, 0.012, 150
EMA = 0.9985
CAPTION_DROPOUT = 0.1
LENGTH_SHARE = {17: 0.76, 13: 0.08, 9: 0.08, 5: 0.08}
ENCODE_SHARE = 0.12  # of the time, for fresh scenes
SMALL_CAPACITY = {1: 6000, 17: 200, 13: 30, 9: 30, 5: 30}
CAPACITY = {1: 400_000, 17: 50_000, 13: 8_000, 9: 8_000, 5: 8_000}


def rate_factor(progress: float, step: int) -> float:
    """Warm-up, constant, then linear to a fiftieth from 45 % of the whole schedule on."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, 0.02 + 0.98 * (1.0 - progress) / 0.55)


def split_parameters(model: Denoiser) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """-> (for Muon, for AdamW)."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = ".blocks." in name or ".block." in name or "condition_embedder" in name
        embedding = "shared" in name or "embed_tokens" in name or "relative_attention_bias" in name
        (matrices if inner and parameter.ndim == 2 and not embedding else others).append(parameter)
    return matrices, others


def flow_loss(model: Denoiser, latents: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rectified flow: mean squared error of the velocity noise - data, at a random noise level per sample."""
    sigma = draw_sigma(latents.shape[0], latents.device)
    noise = torch.randn_like(latents)
    level = sigma.view(-1, 1, 1, 1, 1)
    velocity = model((1 - level) * latents + level * noise, sigma, drop_captions(ids, CAPTION_DROPOUT))
    return (velocity.float() - (noise - latents)).square().mean()


class Trainer:
    """Model, average, optimisers, bank and log of one part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device.type == "cuda"
        torch.manual_seed(args.seed)
        sprites = np.load(args.sprites)
        # Workers fork before the first use of the GPU in this process; each part has scenes of its own.
        seed = args.seed + round(1000 * args.schedule[0])
        data = SceneBlocks(sprites["clash"], args.images, args.videos, args.video_share, seed, args.core)
        blocks = start_loader(data, args.workers)
        next(blocks)
        torch.set_float32_matmul_precision("high")
        weights, vae_meta = load_checkpoint(args.out, "vae")
        vae = make_vae().to(self.device).requires_grad_(False)
        vae.load_state_dict(with_prefix("vae", weights))
        compositor = Compositor(sprites["rgba"], self.device, torch.bfloat16 if on_gpu else torch.float32)
        capacity = CAPACITY if on_gpu else SMALL_CAPACITY
        statistics = (vae_meta["latents_mean"], vae_meta["latents_std"])
        self.bank = LatentBank(ClipVae(vae, fuse=on_gpu), compositor, blocks, capacity, statistics, self.device)
        self.model = self._make_model()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.average_parameters, self.parameters = list(self.average.parameters()), list(self.model.parameters())
        self.model.use_training_attention(CAPTION_TOKENS)
        if on_gpu and not args.no_compile:
            torch.fx.experimental._config.use_duck_shape = False  # 64 tokens and 64 per head are no relation
            for block in self.model.transformer.blocks:
                block.compile(dynamic=True)
        matrices, others = split_parameters(self.model)
        if args.adam_only:
            matrices, others = [], others + matrices
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, lr=args.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=on_gpu)
        self.random = random.Random(seed)

    def _make_model(self) -> Denoiser:
        model = Denoiser(make_text_encoder(len(build_tokenizer(load_vocabulary()))), make_transformer())
        self.meta: dict[str, Any] = {"history": [], "steps": 0, "seconds": 0.0, "images": 0, "videos": 0}
        initialise_transformer(model.transformer)
        if self.args.resume:
            weights, self.meta = load_checkpoint(self.args.out, "dit")
            model.load_weights(weights)
        return model.to(self.device)

    def batch(self) -> tuple[bool, torch.Tensor, torch.Tensor]:
        """A batch of one clip length with about the same number of tokens whatever the length."""
        if self.random.random() < self.args.image_share:
            return False, *self.bank.rings[1].draw(self.args.batch)
        frames = self.random.choices(list(LENGTH_SHARE), list(LENGTH_SHARE.values()))[0]
        return True, *self.bank.rings[frames].draw(max(1, self.args.batch // ((frames - 1) // 4 + 1)))

    def step(self, index: int, progress: float) -> tuple[bool, torch.Tensor]:
        """One update. -> whether of clips, loss on the device."""
        factor = rate_factor(progress, index)
        video, latents, ids = self.batch()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = flow_loss(self.model, latents, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.adam.param_groups[0]["lr"] = self.args.adam_rate * factor
        self.adam.step()
        self.muon.step(MUON_RATE * factor)
        self.model.zero_grad(set_to_none=False)
        torch._foreach_lerp_(self.average_parameters, self.parameters, 1 - min(EMA, (index + 1) / (index + 20)))
        self.meta["videos" if video else "images"] += latents.shape[0]
        return video, loss.detach()

    def save(self, seconds: float) -> None:
        """The averaged weights and the log."""
        self.meta["seconds"] = self.seconds_before + seconds
        save_checkpoint(self.args.out, "dit", self.average.weights(), self.meta)

    def run(self) -> None:
        """Until the clock says stop."""
        args, start = self.args, time.monotonic()
        self.seconds_before: float = self.meta["seconds"]
        block_seconds = self.bank.fill(args.fill_seconds)
        filled = {frames: ring.filled for frames, ring in self.bank.rings.items()}
        print(f"bank {filled}, {block_seconds * 1e3:.1f} ms a block", flush=True)
        begin, end = args.schedule
        index, saved, interval, mark = 0, time.monotonic(), 1, 0.0
        totals: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        while (share := (time.monotonic() - start) / (60 * args.max_minutes)) < 1 and index < args.max_steps:
            video, loss = self.step(index, begin + (end - begin) * share)
            totals[video].append(loss)
            index += 1
            if index == 60:
                mark = time.monotonic()
            if index == 120:
                interval = max(1, round(block_seconds / ((time.monotonic() - mark) / 60 * ENCODE_SHARE)))
                print(f"step {(time.monotonic() - mark) / 60 * 1e3:.1f} ms, a fresh block every {interval}", flush=True)
            if index > 120 and index % interval == 0:
                self.bank.refill()
            if index % args.log_every == 0:
                self._log(totals, index, time.monotonic() - start)
            if time.monotonic() - saved > args.save_seconds:
                self.save(time.monotonic() - start)
                saved = time.monotonic()
        self.meta["steps"] += index
        self.save(time.monotonic() - start)
        print(f"dit: {self.meta['steps']} steps, {self.meta['images']} images, {self.meta['videos']} clips", flush=True)

    def _log(self, totals: dict[bool, list[torch.Tensor]], index: int, seconds: float) -> None:
        means = [float(torch.stack(v).mean()) if v else 0.0 for v in totals.values()]
        for values in totals.values():
            values.clear()
        row = [self.meta["steps"] + index, round(self.seconds_before + seconds, 1), *(round(m, 5) for m in means)]
        self.meta["history"].append(row)
        print(f"dit step {row[0]} {row[1]} s: images {row[2]}, clips {row[3]}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--max-minutes", type=float, default=5.0)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--schedule", type=float, nargs=2, default=(0.0, 1.0), help="progress at start and end")
    parser.add_argument("--image-share", type=float, default=0.52, help="of all steps; most others are of 17 frames")
    parser.add_argument("--video-share", type=float, default=0.6, help="of freshly drawn blocks")
    parser.add_argument("--core", action="store_true", help="the small vocabulary of core_subjects.txt")
    parser.add_argument("--adam-rate", type=float, default=ADAM_RATE)
    parser.add_argument("--adam-only", action="store_true", help="no Muon, whose step is dear without a GPU")
    parser.add_argument("--batch", type=int, default=512, help="images in a batch; clips in proportion to tokens")
    parser.add_argument("--images", type=int, default=256, help="images in a freshly drawn block")
    parser.add_argument("--videos", type=int, default=16, help="clips in a freshly drawn block")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--fill-seconds", type=float, default=28.0)
    parser.add_argument("--save-seconds", type=float, default=90.0)
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
