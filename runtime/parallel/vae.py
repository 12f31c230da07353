"""A picture cut over the ranks of a group while a VAE runs on it, equal to the uncut run.

The VAE's modules stay as they are. `Shared` is a torch function mode: inside it, the four functions in which a pixel
looks beyond itself do their share of the whole picture instead of seeing the share as all there is:

    pad, convolution        get the neighbours' rows (the halo) instead of zeros; zeros stay at the picture's edges
    group_norm              joins the ranks' means and variances, weighted by their shares
    scaled_dot_product_attention   own queries, everybody's keys and values

All else in a VAE (activations, norms over channels, upsampling by repetition, the time axis) is local. Exchanging a
halo of one row per convolution moves a few hundred kilobytes; computing it redundantly instead would take 13 latent
rows on each side in Wan's decoder, 47 % more work on eight ranks (docs/vae.md), and cannot be exact with group norms.

Exact up to the order of sums. Works on gloo and NCCL; all ranks of the group must make the same calls. "Rows" below are
slices along `dim`: of height (-2) or width (-1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from safelight.runtime.parallel.ulysses import split_sizes


@dataclass(frozen=True, slots=True)
class Cut:
    """Which rows of a picture each rank holds: rank r has `sizes[r]` >= 1 latent rows, in order."""

    dim: int
    sizes: list[int]
    rank: int
    group: dist.ProcessGroup

    def share(self, x: Tensor, *, scale: int = 1) -> Tensor:
        """This rank's rows of a whole tensor with `scale` rows per latent row. Inverse: `gather`."""
        return x.narrow(self.dim, scale * sum(self.sizes[: self.rank]), scale * self.sizes[self.rank])

    def gather(self, x: Tensor, *, dim: int | None = None) -> Tensor:
        """The whole tensor, on every rank, from the shares along `dim` (default: the cut's). Inverse: `share`.

        Also for what a share's pixels became: tokens, frames. Shares are padded to the largest for the all-gather.
        """
        dim = self.dim if dim is None else dim
        unit = x.shape[dim] // self.sizes[self.rank]
        front = x.movedim(dim, 0)
        padded = front.new_zeros((unit * max(self.sizes), *front.shape[1:]))
        padded[: front.shape[0]] = front
        gathered = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(gathered, padded, group=self.group)
        whole = torch.cat([part[: unit * size] for part, size in zip(gathered, self.sizes, strict=True)])
        return whole.movedim(0, dim)

    def extend(self, x: Tensor, above: int, below: int) -> Tensor:
        """x with the last `above` rows of the previous rank's x before it and the first `below` rows of the next
        rank's x behind it; zeros at the picture's edges."""
        rows = x.shape[self.dim]
        assert max(above, below) <= rows, f"a halo of {above} and {below} rows needs shares of as many, got {rows}"
        before, behind = (x.new_zeros(x.narrow(self.dim, 0, n).shape) for n in (above, below))
        exchange: list[dist.P2POp] = []
        if self.rank > 0:
            exchange += self._swap(self.rank - 1, x.narrow(self.dim, 0, below), before)
        if self.rank + 1 < len(self.sizes):
            exchange += self._swap(self.rank + 1, x.narrow(self.dim, rows - above, above), behind)
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        return torch.cat([before, x, behind], dim=self.dim)

    def _swap(self, neighbour: int, outgoing: Tensor, incoming: Tensor) -> list[dist.P2POp]:
        peer = dist.get_global_rank(self.group, neighbour)
        ops = [(dist.isend, outgoing.contiguous()), (dist.irecv, incoming)]
        return [dist.P2POp(op, tensor, peer, self.group) for op, tensor in ops if tensor.numel()]

    def group_moments(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (biased) variance over the whole picture from each rank's over its share, by the law of total
        variance. Any equal shapes."""
        mine = torch.stack([mean, variance])
        gathered = [torch.empty_like(mine) for _ in self.sizes]
        dist.all_gather(gathered, mine, group=self.group)
        means, variances = torch.stack(gathered).unbind(1)
        weights = torch.tensor(self.sizes, dtype=torch.float32) / sum(self.sizes)
        weights = weights.to(mean.device, non_blocking=True).view(-1, *[1] * mean.ndim)
        whole = (weights * means).sum(0)
        return whole, (weights * (variances + (means - whole) ** 2)).sum(0)


def cut_for(height: int, width: int, *, group: dist.ProcessGroup | None) -> Cut | None:
    """The cut of a picture of latent size (height, width): its longer side, in shares that differ by at most one.

    None: the picture stays whole, because there is one rank or fewer rows than ranks; every rank then does all of it.
    """
    world = 1 if group is None else dist.get_world_size(group)
    dim, rows = (-1, width) if width > height else (-2, height)
    if group is None or rows < world:
        return None
    return Cut(dim, split_sizes(rows, world), dist.get_rank(group), group)


def shared(cut: Cut | None) -> AbstractContextManager[Any]:
    """Inside: a module called on this rank's share computes this rank's share of its result. None: nothing changes."""
    return nullcontext() if cut is None else Shared(cut)


class Shared(TorchFunctionMode):
    """See the module's docstring. Strided convolutions expect shares that are multiples of the stride."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._cut = cut
        self._shares: dict[Any, Callable[..., Tensor]] = {
            F.pad: self._pad,
            F.conv2d: self._conv2d,
            F.conv3d: self._conv3d,
            F.group_norm: self._group_norm,
            F.scaled_dot_product_attention: self._attention,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._shares.get(func, func)(*args, **(kwargs or {}))

    def _pad(self, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
        assert mode == "constant", f"zero padding expected, got {mode}"
        pads, first = list(pad), 2 * (-1 - self._cut.dim)
        above, below = pads[first : first + 2] or (0, 0)
        if above or below:
            assert not value, f"zero padding expected, got {value}"
            x = self._cut.extend(x, above, below)
            pads[first : first + 2] = [0, 0]
        return F.pad(x, pads, mode, value) if any(pads) else x

    def _conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *rest: Any) -> Tensor:
        x, padding = self._halo(x, padding)
        return F.conv2d(x, weight, bias, stride, padding, *rest)

    def _conv3d(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *rest: Any) -> Tensor:
        x, padding = self._halo(x, padding)
        return F.conv3d(x, weight, bias, stride, padding, *rest)

    def _halo(self, x: Tensor, padding: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The rows that a convolution would pad along the cut, taken from the neighbours, and what it pads now."""
        left = list(padding)
        rows, left[self._cut.dim] = left[self._cut.dim], 0
        return (self._cut.extend(x, rows, rows) if rows else x), tuple(left)

    def _group_norm(
        self, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        assert weight is not None, "a group norm with weights expected"
        assert bias is not None, "a group norm with biases expected"
        scale, shift = group_affine(x, groups, weight, bias, eps, self._cut)
        return torch.addcmul(shift, x, scale).to(x.dtype)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        assert options.get("attn_mask") is None, "attention without a mask expected"
        whole = self._cut.gather(torch.cat([key, value], -1), dim=-2)
        keys, values = torch.split(whole, [key.shape[-1], value.shape[-1]], -1)
        return F.scaled_dot_product_attention(query, keys, values, **options)


def group_affine(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, cut: Cut | None
) -> tuple[Tensor, Tensor]:
    """Group norm of a share x (B, C, ...) as `x * scale + shift`, both (B, C, 1, ...) float32."""
    parts = x.reshape(x.shape[0], groups, -1).chunk(4, dim=1)  # by parts: a float32 copy of all of x would be large
    moments = [torch.var_mean(part.float(), dim=-1, correction=0) for part in parts]
    variance, mean = (torch.cat(values, dim=1) for values in zip(*moments, strict=True))
    if cut is not None:
        mean, variance = cut.group_moments(mean, variance)
    per_group = x.shape[1] // groups
    scale = (variance + eps).rsqrt().repeat_interleave(per_group, 1) * weight
    shift = bias - mean.repeat_interleave(per_group, 1) * scale
    shape = (*scale.shape, *[1] * (x.ndim - 2))
    return scale.view(shape), shift.view(shape)
