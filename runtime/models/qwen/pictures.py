"""The pixels of pictures to edit, as the VAE and the text encoder take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from safelight.configs.families.qwen_pictures import EditRule, fitted
from safelight.runtime.models.encoders.qwen2_5_vl import SeenPictures

# Settings of preprocessor_config.json that the processor class takes; the rest names classes or is of videos.
_SETTINGS = (
    "size", "min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std",
    "rescale_factor", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "resample",
)  # fmt: skip


def kept_pixels(picture: Image.Image, rule: EditRule) -> torch.Tensor:
    """(3, 1, H, W) in [-1, 1] at the size that the transformer sees, as diffusers' VaeImageProcessor makes it."""
    size = fitted(picture.size, rule.kept_area)
    values = np.asarray(picture.resize(size, Image.Resampling.LANCZOS), dtype=np.float32) / 255.0
    return 2.0 * torch.from_numpy(values).permute(2, 0, 1).unsqueeze(1) - 1.0


def seen_pictures(pictures: Sequence[Image.Image], rule: EditRule, settings: Mapping[str, Any]) -> SeenPictures:
    """The patches that the text encoder's vision tower reads. `settings`: of processor/preprocessor_config.json."""
    processor = Qwen2VLImageProcessorPil(**{name: settings[name] for name in _SETTINGS if name in settings})
    sizes = [fitted(picture.size, rule.seen_area) for picture in pictures]
    resized = [p.resize(size, Image.Resampling.LANCZOS) for p, size in zip(pictures, sizes, strict=True)]
    made = processor(images=resized, return_tensors="pt")
    merged = int(processor.merge_size)
    grids = tuple((rows // merged, columns // merged) for _, rows, columns in made["image_grid_thw"].tolist())
    return SeenPictures(made["pixel_values"], grids)
