"""One rank of the shared-VAE tests; `test_vae_ranks.py` starts it.

    vae_ranks.py RANK FOLDER

Four processes share every case; two of them, which are not the first, then do so as a group of their own. Each writes
its results, whole pictures, to FOLDER/4ranks.RANK.safetensors and FOLDER/2ranks.RANK.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from safelight.runtime.models.vae.kl import KlVae
from safelight.runtime.models.vae.wan import DecodeCursor, WanVae
from safelight.runtime.parallel.vae import Cut, Shared, cut_for

Group = dist.ProcessGroup | None
WORLD, PAIR = 4, (1, 2)
SCALE = 4  # pixels per latent of both tiny VAEs
# (height, width) in latents; on 4 ranks the last two have fewer rows than ranks
SIZES = [(4, 8), (5, 3), (3, 11), (2, 3), (1, 1)]
WAN_SIZES = [(4, 8, 3), (5, 3, 2), (3, 7, 1), (3, 2, 2)]


def wan(group: Group, band_rows: int | None = None) -> WanVae:
    torch.manual_seed(0)
    module = AutoencoderKLWan(
        base_dim=6, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True]
    )
    module.train(False)
    mean, std = torch.linspace(-1, 1, 4).view(1, 4, 1, 1, 1), torch.linspace(1, 2, 4).view(1, 4, 1, 1, 1)
    return WanVae(module, mean, 1 / std, group, band_rows)


def kl(group: Group, band_rows: int | None = None) -> KlVae:
    torch.manual_seed(0)
    levels = 3
    module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.4,
        shift_factor=0.1,
    )
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    module.train(False)
    return KlVae(module, group, band_rows)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def wan_frames(vae: WanVae, latents: Tensor, *, rounded: bool) -> Tensor:
    """All frames: as delivered, (F, H, W, 3) uint8, or before rounding, (3, F, H, W)."""
    cut = cut_for(*latents.shape[-2:], group=vae.group)
    cursor: DecodeCursor | None = None
    parts: list[Tensor] = []
    while not parts or cursor is not None:
        if rounded:
            part, cursor = vae.decode(latents, cursor)
        else:
            part, cursor = vae.decode_share(latents, cursor, cut)
            part = part if cut is None else cut.gather(part)
        parts.append(part)
    return torch.cat(parts, 0 if rounded else 1)


def cases(group: Group) -> dict[str, Callable[[], Tensor]]:
    """Name -> what computes it; a name that ends in `_bands` must equal the name without."""
    made: dict[str, Callable[[], Tensor]] = {}
    for bands in (None, 2):
        w, k, suffix = wan(group, bands), kl(group, bands), "_bands" * (bands is not None)
        for height, width, frames in WAN_SIZES:
            size, latents = f"{height}x{width}x{frames}", noise(4, frames, height, width)
            made[f"wan_decode_{size}{suffix}"] = partial(wan_frames, w, latents, rounded=False)
            made[f"wan_frames_{size}{suffix}"] = partial(wan_frames, w, latents, rounded=True)
        for height, width in SIZES:
            made[f"kl_decode_{height}x{width}{suffix}"] = partial(k.pixels, noise(2, 4, height, width))
    for height, width, frames in WAN_SIZES:
        video = noise(3, 4 * frames - 3, SCALE * height, SCALE * width)
        made[f"wan_encode_{height}x{width}x{frames}"] = partial(w.encode, video)
    for height, width in SIZES:
        made[f"kl_encode_{height}x{width}"] = partial(k.encode, noise(2, 3, SCALE * height, SCALE * width))
    return made


def dropped_halo(cut: Cut, x: Tensor, above: int, below: int) -> Tensor:
    return F.pad(x, (0, 0, above, below) if cut.dim == -2 else (above, below))


def own_statistics(cut: Cut, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    return mean, variance


def own_attention(mode: Shared, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, **options)


CONTROLS = {  # control -> the case that it must spoil
    "dropped_halo_wan": "wan_decode_4x8x3",
    "dropped_halo_wan_encode": "wan_encode_4x8x3",
    "dropped_halo_kl": "kl_decode_4x8",
    "dropped_halo_kl_encode": "kl_encode_4x8",
    "own_statistics_kl": "kl_decode_4x8",
    "own_attention_wan": "wan_decode_4x8x3",
    "own_attention_kl": "kl_decode_4x8",
}


def spoiled(control: str, compute: Callable[[], Tensor]) -> Tensor:
    """The case with one thing missing."""
    owner, name, change = {
        "dropped_halo": (Cut, "extend", dropped_halo),
        "own_statistics": (Cut, "group_moments", own_statistics),
        "own_attention": (Shared, "_attention", own_attention),
    }["_".join(control.split("_")[:2])]
    with patch.object(owner, name, change):
        return compute()


def run(group: Group) -> dict[str, Tensor]:
    """All cases; in a group also the controls."""
    made = cases(group)
    results = {name: compute().contiguous() for name, compute in made.items()}
    if group is not None:
        results |= {name: spoiled(name, made[case]).contiguous() for name, case in CONTROLS.items()}
    return results


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store, limit = (folder / "store").resolve().as_uri(), timedelta(seconds=200)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=limit)
    pair = dist.new_group(list(PAIR))
    with torch.inference_mode():
        save_file(run(dist.group.WORLD), folder / f"{WORLD}ranks.{rank}.safetensors")
        if rank in PAIR:
            save_file(run(pair), folder / f"{len(PAIR)}ranks.{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
