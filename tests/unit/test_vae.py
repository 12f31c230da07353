"""The VAEs on one rank: equal to diffusers', in one piece and in bands, and bands hold less."""

from __future__ import annotations

import importlib.util
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from torch._C._distributed_c10d import HashStore, ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safelight.configs.server_args import ServerArgs
from safelight.runtime.errors import ModelError
from safelight.runtime.launch.folders import create_run_folder
from safelight.runtime.launch.processes import Group
from safelight.runtime.launch.specs import worker_spec
from safelight.runtime.messages import SlotPool
from safelight.runtime.models.vae import tiles
from safelight.runtime.models.vae.kl import KlVae, load_kl_vae
from safelight.runtime.models.vae.wan import DecodeCursor, WanVae, load_wan_vae
from safelight.runtime.models.wan.pipeline import WanPipeline
from safelight.runtime.parallel.vae import Cut, cut_for
from safelight.runtime.worker.main import _load, _options

TOLERANCE = 1e-5
SCRIPTS = Path(__file__).parents[2] / "scripts"
CPU = torch.device("cpu")
LONG = [(26, 2), (3, 27)]  # longer than a band with all its margins


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"base_dim": 6, "dim_mult": [1, 2, 2], "num_res_blocks": 1}
    folder = tmp_path_factory.mktemp("wan")
    AutoencoderKLWan(z_dim=16, temperal_downsample=[True, True], **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_post_quant_conv=False,
    )
    folder = tmp_path_factory.mktemp("kl")
    module.save_pretrained(folder)
    return folder


def wan(folder: Path, band_rows: int | None = None) -> WanVae:
    return load_wan_vae(folder, CPU, torch.float32, encoder=True, band_rows=band_rows)


def kl(folder: Path, band_rows: int | None = None) -> KlVae:
    return load_kl_vae(folder, CPU, torch.float32, encoder=True, band_rows=band_rows)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def wan_pixels(vae: WanVae, latents: Tensor) -> Tensor:
    """All frames before rounding, (3, F, H, W)."""
    cursor: DecodeCursor | None = None
    parts: list[Tensor] = []
    while not parts or cursor is not None:
        part, cursor = vae.decode_share(latents, cursor, None)
        parts.append(part)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_wan_equals_the_reference_both_ways(wan_folder: Path, frames: int) -> None:
    vae = wan(wan_folder)
    video = noise(3, 4 * frames - 3, 16, 12)
    with torch.inference_mode():
        expected = (vae.module.encode(video[None]).latent_dist.mode() - vae.mean) * vae.inverse_std
        latents = vae.encode(video)
        pixels = vae.module.decode(latents[None] / vae.inverse_std + vae.mean).sample[0]
    assert latents.shape == (16, frames, 4, 3)
    assert (latents - expected[0]).abs().max() <= TOLERANCE
    assert (wan_pixels(vae, latents).clamp(-1, 1) - pixels).abs().max() <= TOLERANCE


def test_kl_equals_the_reference_both_ways(kl_folder: Path) -> None:
    vae = kl(kl_folder)
    with torch.inference_mode():
        picture = noise(2, 3, 20, 12)
        expected = (vae.module.encode(picture).latent_dist.mode() - 0.1) * 0.4
        latents = vae.encode(picture)
        pixels = vae.module.decode(latents / 0.4 + 0.1).sample
        assert latents.shape == (2, 4, 5, 3)
        assert (latents - expected).abs().max() <= TOLERANCE
        assert (vae.pixels(latents) - pixels).abs().max() <= TOLERANCE


def test_kl_frames_are_the_references_picture(kl_folder: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor

    vae, latents = kl(kl_folder), noise(4, 1, 5, 3)
    with torch.inference_mode():
        pixels = vae.module.decode(latents[:, 0][None] / 0.4 + 0.1).sample
        frames, _ = vae.decode(latents)
    picture: Any = VaeImageProcessor().postprocess(pixels, output_type="np")
    assert frames.shape == (1, 20, 12, 3)
    assert (frames.int() - torch.from_numpy((picture * 255).round())).abs().max() <= 1
    assert frames.float().std() > 10


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("size", LONG)
def test_wan_in_bands_equals_wan_in_one_piece(wan_folder: Path, size: tuple[int, int], frames: int) -> None:
    latents = noise(16, frames, *size)
    whole = wan_pixels(wan(wan_folder), latents)
    assert (wan_pixels(wan(wan_folder, 4), latents) - whole).abs().max() <= TOLERANCE


def test_a_band_without_the_rows_around_it_shows(wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = noise(16, 1, *LONG[0])
    whole = wan_pixels(wan(wan_folder), latents)
    monkeypatch.setattr(tiles, "_margins", lambda stages: [0] * (len(stages) + 1))
    assert (wan_pixels(wan(wan_folder, 4), latents) - whole).abs().max() > 50 * TOLERANCE


@pytest.mark.parametrize("size", LONG)
def test_kl_in_bands_equals_kl_in_one_piece(kl_folder: Path, size: tuple[int, int]) -> None:
    latents = noise(2, 4, *size)
    with torch.inference_mode():
        assert (kl(kl_folder, 4).pixels(latents) - kl(kl_folder).pixels(latents)).abs().max() <= TOLERANCE


def test_interleaved_decodes_in_bands_equal_separate_ones(wan_folder: Path) -> None:
    vae, first, second = wan(wan_folder, 4), noise(16, 2, 9, 5), noise(16, 2, 9, 5).flip(2)
    with torch.inference_mode():
        a, after_a = vae.decode(first, None)
        b, after_b = vae.decode(second, None)
        again, _ = vae.decode(first, after_a)
        assert torch.equal(vae.decode(first, after_a)[0], again)  # the cursor was not changed
        separate = vae.decode(first, vae.decode(first, None)[1])[0]
    assert torch.equal(again, separate)
    assert not torch.equal(a, b)
    assert after_b is not None


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that results of operations held at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


def peak(compute: Callable[[], object]) -> int:
    mode = _Peak()
    with torch.inference_mode(), mode:
        compute()
    return mode.most


def test_bands_hold_less_at_once(wan_folder: Path, kl_folder: Path) -> None:
    picture, latents = noise(16, 1, 48, 4), noise(1, 4, 48, 4)
    whole, bands = wan(wan_folder), wan(wan_folder, 8)
    assert peak(lambda: bands.decode(picture, None)) < 0.4 * peak(lambda: whole.decode(picture, None))
    alone, banded = kl(kl_folder), kl(kl_folder, 8)
    assert peak(lambda: banded.pixels(latents)) < 0.7 * peak(lambda: alone.pixels(latents))


@pytest.mark.parametrize("shape", [(3, 4, 16, 16), (3, 5, 18, 16), (3, 5, 16, 10)])
def test_a_video_without_latents_is_refused(wan_folder: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="4n \\+ 1 frames in multiples of 4"):
        wan(wan_folder).encode(torch.zeros(shape))


def test_a_picture_without_latents_is_refused(kl_folder: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 4 pixels expected, got 10x16"):
        kl(kl_folder).encode(torch.zeros(1, 3, 16, 10))


def test_another_vae_is_refused(wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="AutoencoderKL without patch_size expected, got AutoencoderKLWan"):
        kl(wan_folder)
    residual = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], temperal_downsample=[True], is_residual=True)
    residual.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_residual"]
    with pytest.raises(ModelError, match="--vae-tiling"):
        wan(tmp_path, 4)


def test_one_rank_cuts_nothing() -> None:
    assert cut_for(60, 104, group=None) is None


def test_a_cut_side_is_never_the_banded_one() -> None:
    one = ProcessGroup(HashStore(), 0, 1)
    for dim, other in ((-1, -2), (-2, -1)):
        assert tiles.band_dim((8, 8), Cut(dim, [4, 4], 0, one)) == other
    assert tiles.band_dim((60, 104), None) == -1
    assert tiles.band_dim((104, 60), None) == -2


@pytest.mark.parametrize("tiling", [False, True])
def test_the_flag_reaches_the_vae(tmp_path: Path, tiling: bool) -> None:
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPTS / "make_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    script.make("wan2.1-t2v", tmp_path / "model")
    args = ServerArgs(vae_tiling=tiling, device="cpu")
    run = create_run_folder(tmp_path / "state")
    worker = worker_spec(args, run, SlotPool("x", 1, 1), tmp_path / "model", "cpu", Group(0), 0)
    loaded = _load(worker, _options(worker, CPU))
    assert isinstance(loaded, WanPipeline)
    assert loaded.vae.band_rows == (tiles.WAN_BAND_ROWS if tiling else None)
    assert not loaded.collective_decode
