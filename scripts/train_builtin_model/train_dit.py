"""Trains the text encoder and the transformer together, by flow matching in the latent space of the trained VAE.

Usage: python -m train_builtin_model.train_dit --sprites work/sprites.npz --out work --max-minutes 6.5
       in parts: --max-minutes 2 --schedule 0 0.3, and later, with --resume, --schedule 0.3 1

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
from torch.fx.experimental import _config as fx_config

from train_builtin_model.bank import Examples, LatentBank
from train_builtin_model.checkpoint import load_checkpoint, save_checkpoint, with_prefix
from train_builtin_model.clip_vae import ClipVae
from train_builtin_model.compose import Compositor
from train_builtin_model.denoiser import Denoiser, draw_sigma, drop_captions, layout_loss
from train_builtin_model.loader import CAPTION_TOKENS, SceneBlocks, start_loader
from train_builtin_model.models import (
    initialise_text_encoder,
    initialise_transformer,
    make_text_encoder,
    make_transformer,
    make_vae,
)
from train_builtin_model.steps import DEFAULT_FORMS, FORMS, Body, StepRunner
from train_builtin_model.tokenizer import build_tokenizer
from train_builtin_model.update import Updater, check_finite
from train_builtin_model.vocab import load_vocabulary

ADAM_RATE, MUON_RATE, WARM_UP_STEPS = 1.5e-3, 0.012, 300
EMA = 0.999
CAPTION_DROPOUT = 0.1
LAYOUT_WEIGHT = 0.1
LENGTH_SHARE = {17: 0.79, 13: 0.07, 9: 0.07, 5: 0.07}
SMALL_CAPACITY = {1: 6000, 17: 200, 13: 30, 9: 30, 5: 30}
CAPACITY = {1: 300_000, 17: 40_000, 13: 6_000, 9: 6_000, 5: 6_000}


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


def losses(model: Denoiser, batch: Examples, generator: torch.Generator) -> torch.Tensor:
    """-> (2,): mean squared error of the velocity noise - data (rectified flow), at a random noise level per sample;
    that of the objects' places."""
    latents = batch.latents
    sigma = draw_sigma(latents.shape[0], latents.device, generator)
    noise = torch.randn(latents.shape, device=latents.device, generator=generator)
    level, ids = sigma.view(-1, 1, 1, 1, 1), drop_captions(batch.ids, CAPTION_DROPOUT, generator)
    velocity, layout = model((1 - level) * latents + level * noise, sigma, ids)
    flow = (velocity.float() - (noise - latents)).square().mean()
    return torch.stack([flow, layout_loss(layout, ids, batch.spans, batch.places)])


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
        self.data = SceneBlocks(sprites["clash"], args.images, args.videos, args.video_share, seed, args.core)
        self.data.progress.fill_(args.schedule[0])
        blocks = start_loader(self.data, args.workers)
        next(blocks)
        torch.set_float32_matmul_precision("high")
        weights, vae_meta = load_checkpoint(args.out, "vae")
        vae = make_vae().to(self.device).requires_grad_(False)
        vae.load_state_dict(with_prefix("vae", weights))
        compositor = Compositor(sprites["rgba"], self.device, torch.bfloat16 if on_gpu else torch.float32)
        capacity = CAPACITY if on_gpu else SMALL_CAPACITY
        statistics = (vae_meta["latents_mean"], vae_meta["latents_std"])
        self.bank = LatentBank(compositor, blocks, self.device, ClipVae(vae, fuse=on_gpu), capacity, statistics)
        self.model = self._make_model()
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.model.use_training_attention(CAPTION_TOKENS)
        matrices, others = split_parameters(self.model)
        if args.adam_only:
            matrices, others = [], others + matrices
        self.update = Updater(self.model, self.average, matrices, others, args.adam_rate, MUON_RATE)
        self.losses = torch.zeros(2, 3, device=self.device)  # images, clips: sums of both losses, steps
        self.runner = StepRunner(
            {frames: self._body(frames) for frames in capacity}, self._compile, self.take_loss, self.device, seed
        )
        self.random = random.Random(seed)

    def _make_model(self) -> Denoiser:
        model = Denoiser(make_text_encoder(len(build_tokenizer(load_vocabulary()))), make_transformer())
        self.meta: dict[str, Any] = {"history": [], "steps": 0, "seconds": 0.0, "images": 0, "videos": 0}
        initialise_transformer(model.transformer)
        initialise_text_encoder(model.text_encoder)
        if self.args.resume:
            weights, self.meta = load_checkpoint(self.args.out, "dit")
            model.load_weights(weights)
        return model.to(self.device)

    def _compile(self, on: bool) -> None:
        fx_config.use_duck_shape = False  # 64 tokens and 64 per head are no relation
        for block in self.model.transformer.blocks:
            if on:
                block.compile(dynamic=True)
            else:
                block._compiled_call_impl = None

    def batch_size(self, frames: int) -> int:
        """Scenes in a batch: about the same number of tokens whatever the length."""
        batch: int = self.args.batch
        return max(1, batch // ((frames - 1) // 4 + 1))

    def _body(self, frames: int) -> Body:
        ring, count, log = self.bank.rings[frames], self.batch_size(frames), self.losses[int(frames > 1)]

        def body(generator: torch.Generator) -> None:
            with torch.autocast(self.device.type, torch.bfloat16):
                flow, layout = losses(self.model, ring.batch(count, generator), generator)
            self.update.step(flow + LAYOUT_WEIGHT * layout)
            log[:2] += torch.stack([flow, layout]).detach()
            log[2] += 1

        return body

    def take_losses(self) -> list[float]:
        """Mean losses since the last call: of images and of clips, then of both's places; waits for the GPU."""
        (image, image_place, images), (clip, clip_place, clips) = self.losses.tolist()
        self.losses.zero_()
        places = (image_place + clip_place) / max(images + clips, 1.0)
        return [image / max(images, 1.0), clip / max(clips, 1.0), places]

    def take_loss(self) -> float:
        """The velocity's, of whichever there was."""
        return sum(self.take_losses()[:2])

    def prepare(self) -> None:
        """Fill the bank and choose the form of the step; weights stay as they are."""
        self.block_seconds = self.bank.fill(self.args.fill_seconds)
        self.update.schedule(0.0, 0.0)
        known = [self.meta["form"]] if "form" in self.meta else DEFAULT_FORMS  # the part before has tried all
        self.meta["form"] = self.runner.choose(self.args.forms or known)
        self.update.reset()

    def shape(self) -> int:
        """How many frames the next batch has."""
        if self.random.random() < self.args.image_share:
            return 1
        return self.random.choices(list(LENGTH_SHARE), list(LENGTH_SHARE.values()))[0]

    def save(self, seconds: float) -> None:
        """The averaged weights, in half precision (far finer than the shipped bf16), and the log."""
        self.meta["seconds"] = self.seconds_before + seconds
        weights = {name: tensor.half() for name, tensor in self.average.weights().items()}
        save_checkpoint(self.args.out, "dit", weights, self.meta)

    def run(self) -> None:
        """Until the clock says stop."""
        args, start = self.args, time.monotonic()
        self.seconds_before: float = self.meta["seconds"]
        steps_before: int = self.meta["steps"]
        self.prepare()
        begin, end = args.schedule
        index, saved, refilled, begun = 0, time.monotonic(), 0.0, time.monotonic()
        seconds = max(1.0, start + 60 * args.max_minutes - begun)
        while index < args.max_steps:
            share = min(1.0, (time.monotonic() - begun) / seconds)
            if share == 1 and index >= args.min_steps:
                break
            progress = begin + (end - begin) * share
            self.update.schedule(rate_factor(progress, index), 1 - min(EMA, (index + 1) / (index + 20)))
            frames = self.shape()
            self.runner(frames)
            self.meta["videos" if frames > 1 else "images"] += self.batch_size(frames)
            index += 1
            self.meta["steps"] = steps_before + index
            if refilled < args.refill_share * (time.monotonic() - begun):
                self.data.progress.fill_(progress)
                self.bank.refill()
                refilled += self.block_seconds
            if index % args.log_every == 0:
                self._log(time.monotonic() - start)
            if time.monotonic() - saved > args.save_seconds:
                self.save(time.monotonic() - start)
                saved = time.monotonic()
        self.save(time.monotonic() - start)
        skipped = int(self.update.skipped)
        print(
            f"dit: {self.meta['steps']} steps ({skipped} skipped), {self.meta['images']} images, "
            f"{self.meta['videos']} clips", flush=True,
        )  # fmt: skip

    def _log(self, seconds: float) -> None:
        row = [self.meta["steps"], round(self.seconds_before + seconds, 1), *(round(m, 5) for m in self.take_losses())]
        self.meta["history"].append(row)
        print(f"dit step {row[0]} {row[1]} s: images {row[2]}, clips {row[3]}, places {row[4]}", flush=True)
        check_finite("dit", sum(row))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--max-minutes", type=float, default=5.0, help="all of it, but for start-up")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--min-steps", type=int, default=0, help="even when the time is over")
    parser.add_argument("--schedule", type=float, nargs=2, default=(0.0, 1.0), help="progress at start and end")
    parser.add_argument("--image-share", type=float, default=0.75, help="of all steps; most others are of 17 frames")
    parser.add_argument("--video-share", type=float, default=0.5, help="of freshly drawn blocks")
    parser.add_argument("--core", action="store_true", help="the small vocabulary of core_subjects.txt")
    parser.add_argument("--adam-rate", type=float, default=ADAM_RATE)
    parser.add_argument("--adam-only", action="store_true", help="no Muon, whose step is dear without a GPU")
    parser.add_argument("--batch", type=int, default=256, help="images in a batch; clips in proportion to tokens")
    parser.add_argument("--images", type=int, default=256, help="images in a freshly drawn block")
    parser.add_argument("--videos", type=int, default=16, help="clips in a freshly drawn block")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--fill-seconds", type=float, default=20.0)
    parser.add_argument("--refill-share", type=float, default=0.12, help="of the time, for fresh scenes")
    parser.add_argument("--save-seconds", type=float, default=60.0)
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, help="default: plain, graph, compiled graph; resumed: known"
    )
    parser.add_argument("--seed", type=int, default=1)
    Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
