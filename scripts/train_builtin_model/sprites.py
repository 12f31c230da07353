"""Renders the glyphs once: font + Unicode names -> sprites.npz (no pickle inside).

Usage: python -m train_builtin_model.sprites --font NotoColorEmoji.ttf --names data-by-emoji.json --out work/sprites.npz
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from train_builtin_model.vocab import BACKGROUNDS, RECOLOURS, load_vocabulary

SIZE = 128
BITMAP_SIZE = 109  # the only size that the colour bitmap font has
MARGIN = 4
Array = NDArray[np.uint8]


def render_glyph(font: ImageFont.FreeTypeFont, emoji: str) -> Array:
    """-> (128, 128, 4) uint8, the glyph scaled to fill the square but for a margin."""
    canvas = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font has no glyph for {emoji!r}")
    cut = canvas.crop(box)
    scale = (SIZE - 2 * MARGIN) / max(cut.size)
    size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
    cut = _premultiplied_resize(cut, size)
    out = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    out.paste(cut, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return np.asarray(out, dtype=np.uint8)


def _premultiplied_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize without letting the colour of transparent pixels bleed in."""
    rgba = np.asarray(image, dtype=np.float32) / 255.0
    planes = [rgba[..., c] * rgba[..., 3] for c in range(3)] + [rgba[..., 3]]
    small = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in planes]
    alpha = np.clip(small[3], 0.0, 1.0)
    rgb = [np.clip(p / np.maximum(alpha, 1e-3), 0.0, 1.0) for p in small[:3]]
    return Image.fromarray((np.stack([*rgb, alpha], -1) * 255.0 + 0.5).astype(np.uint8))


def recolour(sprite: Array, colour: str) -> Array:
    """Give the sprite's main hue another colour; details in other hues (eyes, leaves, tyres) keep theirs.

    sprite: (128, 128, 4) -> (128, 128, 4). The main hue is the strongest one, within 45 degrees either side.
    """
    hue, saturation, value = RECOLOURS[colour]
    hsv = np.asarray(Image.fromarray(sprite[..., :3]).convert("HSV"), dtype=np.float32)
    h, s, v = hsv[..., 0] * (360.0 / 255.0), hsv[..., 1] / 255.0, hsv[..., 2] / 255.0
    solid = (sprite[..., 3] > 128) & (s > 0.22) & (v > 0.15)
    if not solid.any():
        return sprite
    histogram, _ = np.histogram(h[solid], bins=36, range=(0.0, 360.0), weights=s[solid])
    smooth = histogram + np.roll(histogram, 1) + np.roll(histogram, -1)
    main = float(np.argmax(smooth)) * 10.0 + 5.0
    offset = (h - main + 180.0) % 360.0 - 180.0
    chosen = solid & (np.abs(offset) < 45.0)
    s_scale = saturation / max(float(np.median(s[chosen])), 1e-3)
    v_shift = value / max(float(np.median(v[chosen])), 1e-3)
    new_h = np.where(chosen, (hue + 0.4 * offset) % 360.0, h)
    new_s = np.where(chosen, np.clip(s * s_scale, 0.0, 1.0), s)
    new_v = np.where(chosen, np.clip(v * v_shift, 0.0, 1.0), v)
    packed = np.stack([new_h * (255.0 / 360.0), new_s * 255.0, new_v * 255.0], -1)
    rgb = np.asarray(Image.fromarray(packed.astype(np.uint8), "HSV").convert("RGB"))
    return np.concatenate([rgb, sprite[..., 3:]], -1)


def background_clash(sprite: Array) -> NDArray[np.float32]:
    """-> (number of backgrounds,): the share of the sprite's rim whose colour is near each background colour."""
    alpha = sprite[..., 3] > 128
    inner = alpha.copy()
    for _ in range(5):
        inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    rim = sprite[..., :3][alpha & ~inner].astype(np.float32)
    distances = [np.linalg.norm(rim - np.asarray(c, np.float32), axis=-1) for c in BACKGROUNDS.values()]
    return np.asarray([float((d < 75.0).mean()) for d in distances], np.float32)


def main() -> None:
    """Render everything and write `rgba` (N, 128, 128, 4) uint8 and `clash` (N, backgrounds) float32."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, required=True)
    parser.add_argument("--names", type=Path, required=True, help="data-by-emoji.json of unicode-emoji-json")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    emoji_of = {entry["name"]: emoji for emoji, entry in json.loads(args.names.read_text(encoding="utf-8")).items()}
    font = ImageFont.truetype(str(args.font), BITMAP_SIZE)
    rendered: list[Array] = []
    for sprite in load_vocabulary().sprites:
        picture = render_glyph(font, emoji_of[sprite.glyph])
        rendered.append(recolour(picture, str(sprite.colour)) if sprite.recoloured else picture)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    clash = np.stack([background_clash(p) for p in rendered])
    np.savez_compressed(args.out, rgba=np.stack(rendered), clash=clash)
    print(f"{len(rendered)} sprites -> {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
