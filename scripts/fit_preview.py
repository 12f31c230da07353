"""Fits the preview factors of a VAE: latents -> colours, by least squares (configs/families/latent_rgb.py).

    python scripts/fit_preview.py MODEL                      pictures that the model makes, of the prompts below
    python scripts/fit_preview.py MODEL --prompts FILE       ... of one prompt a line
    python scripts/fit_preview.py MODEL --images FOLDER      pictures that its VAE encodes (Wan's architecture)

MODEL is a directory in diffusers format, or `builtin`. Writes preview.json into its folder vae (or --output) and prints
how much of the colours' variance the linear map explains. Pixels are those that the VAE makes of the latents, averaged
over each latent's square. The latent frames of a video after its first have a map of their own: a causal VAE may encode
them in another way (with the built-in model's, the first frame's map is worse than none for them).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from safelight.configs.families import identify
from safelight.configs.families.latent_rgb import FILE
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.jobs import load_tokenizer, request_of
from safelight.runtime import hub
from safelight.runtime.messages import MediaFormat, MediaSpec
from safelight.runtime.models.registry import LoadOptions, load_pipeline
from safelight.runtime.models.vae.wan import load_wan_vae
from safelight.runtime.parallel.mesh import ParallelMesh
from safelight.runtime.pipelines.protocol import FrameChunk

SUBJECTS = ("red apple", "yellow car", "blue fish", "green tree", "cat", "rocket", "brown horse", "pizza")
GROUNDS = ("blue", "white", "black", "green", "orange", "pink")
Pair = tuple[torch.Tensor, torch.Tensor]  # latents (C, h, w), pixels (3, H, W) in [-1, 1]


def default_prompts() -> list[str]:
    return [
        f"a {s} on a {g} background" for i, s in enumerate(SUBJECTS) for g in (GROUNDS[i % 6], GROUNDS[(i + 3) % 6])
    ]


@torch.inference_mode()
def generated(root: Path, prompts: Sequence[str], device: torch.device) -> Iterator[list[Pair]]:
    """One picture for each prompt, and a clip where the model makes videos."""
    spec = identify(root)
    options = LoadOptions(device, torch.float32, torch.float32, None, ParallelMesh.single())
    pipeline, tokenizer = load_pipeline(root, options), load_tokenizer(spec)
    lengths = (1, 1 + 2 * int(spec.vae["scale_factor_temporal"])) if spec.task.endswith("video") else (1,)
    for number, (prompt, frames) in enumerate(itertools.product(prompts, lengths)):
        params = SamplingParams(prompt=prompt, num_frames=frames, seed=number).merged_over(spec.defaults)
        request = request_of(tokenizer, params, MediaSpec(MediaFormat.PNG))
        state = pipeline.prepare(request, pipeline.encode(request), 0)
        for _ in range(request.num_inference_steps):
            (state,) = pipeline.step([state])
        yield list(_decoded(state.latents, partial(pipeline.decode, state)))


@torch.inference_mode()
def encoded(vae_folder: Path, images: Path, device: torch.device, side: int = 256) -> Iterator[list[Pair]]:
    """A short pan over each picture of a folder. The VAE is one of Wan's architecture."""
    vae = load_wan_vae(vae_folder, device, torch.float32, encoder=True)
    for path in sorted(images.iterdir()):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            continue
        with Image.open(path) as image:
            short = min(image.size)
            cut = image.convert("RGB").resize((side + 32, side + 32), box=(0, 0, short, short))
        whole = torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1) / 127.5 - 1
        pan = torch.stack([whole[:, at : at + side, at : at + side] for at in range(0, 9 * 4, 4)], 1)
        latents = vae.encode(pan)

        def decode(cursor: Any, latents: torch.Tensor = latents) -> tuple[FrameChunk, Any]:
            frames, following = vae.decode(latents, cursor)
            return FrameChunk(frames), following

        yield list(_decoded(latents, decode))


def _decoded(latents: torch.Tensor, decode: Callable[[Any], tuple[FrameChunk, Any]]) -> Iterator[Pair]:
    """Each latent frame of (C, F, h, w) with the mean of the frames that it becomes."""
    cursor, number = None, 0
    while number == 0 or cursor is not None:
        chunk, cursor = decode(cursor)
        yield latents[:, number].float().cpu(), chunk.frames.float().mean(0).permute(2, 0, 1).cpu() / 127.5 - 1
        number += 1


def fit(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(matrix (C, 3), bias (3,), share of the variance explained).

    Raises ValueError for fewer places than channels.
    """
    rows, colours = [], []
    for latents, pixels in pairs:
        height, width = latents.shape[1:]
        rows.append(latents.flatten(1).T)
        colours.append(torch.nn.functional.adaptive_avg_pool2d(pixels, (height, width)).flatten(1).T)
    x, y = torch.cat(rows).double(), torch.cat(colours).double()
    if len(x) <= x.shape[1]:
        raise ValueError(f"{len(x)} places for {x.shape[1]} channels: more or larger pictures are needed")
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    solution = torch.linalg.lstsq(torch.cat([x, ones], 1), y).solution
    residual = y - torch.cat([x, ones], 1) @ solution
    explained = 1 - float(residual.var(0).sum() / y.var(0).sum())
    return solution[:-1], solution[-1], explained


def as_json(matrix: torch.Tensor, bias: torch.Tensor, later: str = "") -> str:
    """The factors, one channel a line; `later`: those of later latent frames, as this made them."""
    rows = [json.dumps([round(v, 4) for v in row]) for row in (*matrix.tolist(), bias.tolist())]
    text = ",\n    ".join(rows[:-1])
    more = f',\n  "later": {later}' if later else ""
    return f'{{\n  "matrix": [\n    {text}\n  ],\n  "bias": {rows[-1]}{more}\n}}'


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    root, device = hub.resolve(None if given.model == "builtin" else given.model), torch.device(given.device)
    if given.images is not None:
        made = list(encoded(root / "vae", given.images, device))
    else:
        prompts = given.prompts.read_text(encoding="utf-8").splitlines() if given.prompts else default_prompts()
        made = list(generated(root, [line for line in prompts if line.strip()], device))
    first, later = [pairs[0] for pairs in made], [pair for pairs in made for pair in pairs[1:]]
    matrix, bias, explained = fit(first)
    text, told = "", f"{len(first)} first frames, {explained:.1%} of the variance explained"
    if later:
        *factors, explained = fit(later)
        text = as_json(*factors)
        told += f"; {len(later)} later latent frames, {explained:.1%}"
    output = given.output or root / "vae" / FILE
    output.write_text(as_json(matrix, bias, text) + "\n", encoding="utf-8")
    print(f"{output}: {told}")


if __name__ == "__main__":
    main()
