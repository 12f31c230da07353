"""Pictures to edit: how large the transformer and the text encoder see them, and how large the result is.

Torch-free: the frontend counts a picture's tokens from its size, workers cut the pixels to the same sizes. The rules
are those of diffusers' QwenImageEditPipeline (one picture, -Edit) and QwenImageEditPlusPipeline (-Edit-2509, -2511),
and of the image processor of Qwen2-VL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Size = tuple[int, int]  # width, height in pixels

_GRID = 32  # resized pictures are multiples of it
MAX_RATIO = 200  # of the sides: what the image processor takes


@dataclass(frozen=True, slots=True)
class EditRule:
    """`seen_area`: pixels of a picture as the text encoder sees it; `kept_area`: as the transformer does, and of a
    result of no asked size; `sized_by`: the picture whose shape that takes."""

    seen_area: int
    sized_by: int
    kept_area: int = 1024 * 1024


# By the most pictures that a model takes.
EDIT_RULES: Mapping[int, EditRule] = MappingProxyType({1: EditRule(1024 * 1024, 0), 3: EditRule(384 * 384, -1)})


def fitted(size: Size, area: int) -> Size:
    """A size of about `area` pixels in the shape of `size`, in multiples of 32."""
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    return max(1, round(width / _GRID)) * _GRID, max(1, round(width / ratio / _GRID)) * _GRID


@dataclass(frozen=True, slots=True)
class Patches:
    """The settings of a Qwen2VLImageProcessor that decide on sizes."""

    least: int  # pixels of a whole picture
    most: int
    patch: int = 14
    merged: int = 2  # patches of a token, along each side

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Patches:
        """From preprocessor_config.json, whose older form names the areas min_pixels and max_pixels."""
        size = settings.get("size") or {}
        return Patches(
            int(settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56),
            int(settings.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280),
            int(settings.get("patch_size", 14)),
            int(settings.get("merge_size", 2)),
        )

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tokens of a picture, whose sides become multiples of a token's and whose area comes
        within the limits."""
        side, (width, height) = self.patch * self.merged, size
        rows, columns = round(height / side), round(width / side)
        if rows * columns * side * side > self.most:
            shrink = math.sqrt(height * width / self.most)
            rows = max(1, math.floor(height / shrink / side))
            columns = max(1, math.floor(width / shrink / side))
        elif rows * columns * side * side < self.least:
            grow = math.sqrt(self.least / (height * width))
            rows, columns = math.ceil(height * grow / side), math.ceil(width * grow / side)
        return rows, columns
