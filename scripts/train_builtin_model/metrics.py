"""What a picture or clip shows, told without any network: nearest reference render, background, kind of motion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from train_builtin_model.vocab import BACKGROUNDS

CROP = 48  # subjects are compared at this size
THRESHOLD = 0.12  # of full scale, in the strongest channel: what differs from the background by more is subject


def border_colour(image: torch.Tensor) -> torch.Tensor:
    """image: (3, H, W) in [0, 1] -> (3,), the median of a four pixel frame."""
    edges = [image[:, :4].flatten(1), image[:, -4:].flatten(1), image[:, :, :4].flatten(1), image[:, :, -4:].flatten(1)]
    return torch.cat(edges, dim=1).median(dim=1).values


def background_name(image: torch.Tensor) -> str:
    """The named colour nearest to the border."""
    colour = border_colour(image) * 255.0
    distances = {name: float((colour - torch.tensor(c)).square().sum()) for name, c in BACKGROUNDS.items()}
    return min(distances, key=lambda name: distances[name])


def subject_mask(image: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """(C, H, W), (C,) -> (H, W) bool."""
    return (image - background[:, None, None]).abs().amax(0) > THRESHOLD


def _extent(weights: torch.Tensor) -> tuple[int, int]:
    """First and last index of a (N,) profile, ignoring the outer 0.4 % of its mass."""
    total = weights.cumsum(0) / weights.sum().clamp_min(1)
    inside = ((total > 0.004) & (total - weights / weights.sum().clamp_min(1) < 0.996)).nonzero().flatten()
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, len(weights))


def normalised_subject(image: torch.Tensor, background: torch.Tensor) -> torch.Tensor | None:
    """The subject, its longer side scaled to fill the square. (C, H, W) -> (C, 48, 48); None if empty."""
    mask = subject_mask(image, background).float()
    if mask.sum() < 12:
        return None
    top, bottom = _extent(mask.sum(1))
    left, right = _extent(mask.sum(0))
    side = max(bottom - top, right - left)
    square = background[:, None, None].expand(-1, side, side).clone()
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    square[:, y : y + bottom - top, x : x + right - left] = image[:, top:bottom, left:right]
    return F.interpolate(square[None], size=(CROP, CROP), mode="bilinear", antialias=True, align_corners=False)[0]


class References:
    """Renders of every sprite, to which a subject is compared. rgba: (N, 128, 128, 4) uint8."""

    SHORTLIST = 12

    def __init__(self, rgba: NDArray[np.uint8]) -> None:
        pictures = torch.from_numpy(rgba).permute(0, 3, 1, 2).float() / 255.0
        pictures[:, :3] *= pictures[:, 3:]
        self.pictures = F.avg_pool2d(pictures, 2)
        cuts = [normalised_subject(picture, torch.zeros(4)) for picture in self.pictures]
        assert all(cut is not None for cut in cuts)
        self.cuts = torch.stack([cut for cut in cuts if cut is not None])

    def nearest(self, image: torch.Tensor, background: torch.Tensor) -> int | None:
        """The sprite whose render on the same background, cut out in the same way, differs least; None if empty.

        A first pass over all sprites, cut out by their alpha, leaves a dozen for the exact comparison.
        """
        subject = normalised_subject(image, background)
        if subject is None:
            return None
        placed = self.cuts[:, :3] + (1 - self.cuts[:, 3:]) * background[None, :, None, None]
        order = (placed - subject).square().mean(dim=(1, 2, 3)).argsort()[: self.SHORTLIST]
        best, best_distance = int(order[0]), float("inf")
        for i in order.tolist():
            picture = self.pictures[i, :3] + (1 - self.pictures[i, 3:]) * background[:, None, None]
            reference = normalised_subject(picture, background)
            if reference is not None:
                distance = float((reference - subject).square().mean())
                if distance < best_distance:
                    best, best_distance = i, distance
        return best


@dataclass(frozen=True, slots=True)
class Track:
    """Of the subject in each frame: centre x and y in pixels, square root of the area."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    size: NDArray[np.float64]


def track(clip: torch.Tensor) -> Track | None:
    """clip: (F, 3, H, W) in [0, 1]. None if some frame is empty."""
    rows: list[tuple[float, float, float]] = []
    for frame in clip:
        mask = subject_mask(frame, border_colour(frame)).double()
        area = mask.sum()
        if area < 12:
            return None
        ys, xs = torch.arange(mask.shape[0]).double(), torch.arange(mask.shape[1]).double()
        rows.append(
            (float((mask.sum(0) * xs).sum() / area), float((mask.sum(1) * ys).sum() / area), float(area.sqrt()))
        )
    x, y, size = (np.asarray(column) for column in zip(*rows, strict=True))
    return Track(x, y, size)


def rotation(clip: torch.Tensor) -> float:
    """Degrees by which the subject turned, in a picture clockwise, from the first to the fifth frame (best match)."""
    first, later = clip[0], clip[4]
    background = border_colour(first)[:, None, None]
    angles = torch.arange(-90.0, 91.0, 5.0)
    radians = torch.deg2rad(angles)
    zero = torch.zeros_like(radians)
    theta = torch.stack([radians.cos(), radians.sin(), zero, -radians.sin(), radians.cos(), zero], 1).view(-1, 2, 3)
    start = (first - background)[None].expand(len(angles), -1, -1, -1)
    turned = F.grid_sample(start, F.affine_grid(theta, list(start.shape), align_corners=False), align_corners=False)
    return float(angles[(turned + background - later).square().mean(dim=(1, 2, 3)).argmin()])


def motion_kind(clip: torch.Tensor) -> str:
    """clip: (F, 3, H, W), F >= 13 -> a key of captions.MOTIONS, or "still", or "none" when the subject vanishes."""
    path = track(clip)
    if path is None:
        return "none"
    dx, dy, growth = path.x[-1] - path.x[0], path.y[-1] - path.y[0], path.size[-1] / path.size[0]
    rise = min(path.y[0], path.y[-1]) - path.y.min()
    if abs(dx) > 14 and abs(dx) > 1.5 * abs(dy):
        return "left" if dx < 0 else "right"
    if rise > 14 and abs(dy) < rise:
        return "bounce"
    if abs(dy) > 14 and abs(dy) > 1.5 * abs(dx):
        return "up" if dy < 0 else "down"
    if growth > 1.35 or growth < 0.74:
        return "grow" if growth > 1 else "shrink"
    return "rotate" if rotation(clip) >= 25.0 else "still"
