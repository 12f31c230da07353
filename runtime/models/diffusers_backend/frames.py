"""What diffusers' pipelines return -> uint8 frames, rounded as diffusers rounds them for PIL."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from safelight.runtime.errors import JobFailed


def to_frames(result: Any, count: int, height: int, width: int) -> torch.Tensor:
    """(F, H, W, 3) uint8 on the CPU, from a pipeline's output object for one picture or video.

    Raises JobFailed when it holds something else than `count` frames of that size: nothing is cut or scaled silently.
    """
    found = result[0] if isinstance(result, tuple) else next(iter(result.values()))
    array = _array(found)
    while array.ndim > 4 and len(array) == 1:
        array = array[0]  # the batch of one
    if array.ndim == 3:
        array = array[None]
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array.repeat(3, axis=-1)
    if array.shape != (count, height, width, 3):
        raise JobFailed(
            f"the pipeline made {'x'.join(map(str, array.shape))} (frames x height x width x channels) where "
            f"{count}x{height}x{width}x3 was asked for; ask for what it can make"
        )
    if array.dtype != np.uint8:
        array = (array * 255).round().astype("uint8")
    return torch.from_numpy(np.ascontiguousarray(array))


def _array(found: Any) -> np.ndarray[Any, Any]:
    if isinstance(found, np.ndarray):
        return found
    if isinstance(found, torch.Tensor):  # (..., C, H, W) in 0 to 1
        return found.detach().float().cpu().movedim(-3, -1).numpy()
    if isinstance(found, Image.Image):
        return np.asarray(found.convert("RGB"))
    if isinstance(found, list | tuple) and found:
        return np.stack([_array(part) for part in found])
    raise JobFailed(f"the pipeline returned {type(found).__name__}; pictures or frames were expected")
