"""Draws the two sample sheets of the model card.

Usage: python -m train_builtin_model.contact_sheet --folder runtime/models/builtin_model --out docs/images
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from train_builtin_model.evaluate import Generator

IMAGE_PROMPTS = (
    "a red apple on a blue background", "a cat", "a dog on a green background", "a rocket on a dark blue background",
    "a red apple to the left of a green car", "a sun above a tree", "three bananas on a pink background",
    "a small duck in the bottom right corner", "a big sunflower", "a robot on an orange background",
    "two penguins on a light blue background", "a blue butterfly", "a pizza on a yellow background",
    "a purple umbrella on a beige background", "four strawberries", "a ghost above a castle on a purple background",
    "a guitar", "an elephant to the right of a mouse", "a cup of coffee on a teal background",
    "a dragon on a white background",
)  # fmt: skip
VIDEO_PROMPTS = (
    "a rocket moving up", "a red car moving left on a yellow background", "a star spinning on a dark blue background",
    "a basketball bouncing", "a snowman shrinking on a pink background", "a green dragon growing",
    "a turtle moving right on a light blue background", "a maple leaf falling on an orange background",
)  # fmt: skip
VIDEO_FRAMES = (0, 3, 5, 8, 11, 13, 16)
TILE, LABEL, COLUMNS = 128, 28, 5


def _label(draw: ImageDraw.ImageDraw, x: int, y: int, text: str, width: int) -> None:
    font = ImageFont.load_default(10)
    draw.multiline_text(
        (x + 2, y + 1), "\n".join(textwrap.wrap(text, width)[:2]), fill=(40, 40, 40), font=font, spacing=1
    )


def _picture(frame: torch.Tensor) -> Image.Image:
    return Image.fromarray((frame.permute(1, 2, 0).numpy() * 255.0 + 0.5).astype(np.uint8))


def image_sheet(clips: list[torch.Tensor], prompts: tuple[str, ...]) -> Image.Image:
    """A grid of pictures with their prompts below."""
    rows = -(-len(clips) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 4), rows * (TILE + LABEL)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
        x, y = (i % COLUMNS) * (TILE + 4) + 2, (i // COLUMNS) * (TILE + LABEL)
        sheet.paste(_picture(clip[0]), (x, y))
        _label(draw, x, y + TILE, prompt, 24)
    return sheet


def video_sheet(clips: list[torch.Tensor], prompts: tuple[str, ...]) -> Image.Image:
    """One row of frames for each clip, its prompt above."""
    side = 96
    sheet = Image.new("RGB", (len(VIDEO_FRAMES) * (side + 3), len(clips) * (side + 16)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for row, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
        y = row * (side + 16)
        _label(draw, 0, y, prompt, 90)
        for column, frame in enumerate(VIDEO_FRAMES):
            small = _picture(clip[frame]).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (column * (side + 3), y + 15))
    return sheet


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generate = Generator(args.folder, args.steps, args.guidance, None, 10)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, sheet in (
        ("images", image_sheet(generate(list(IMAGE_PROMPTS), 1), IMAGE_PROMPTS)),
        ("video", video_sheet(generate(list(VIDEO_PROMPTS), 17), VIDEO_PROMPTS)),
    ):
        path = args.out / f"builtin_{name}.png"
        sheet.quantize(255, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
