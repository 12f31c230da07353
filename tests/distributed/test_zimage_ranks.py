"""The Z-Image pipeline on layouts of 2, 3 and 4 gloo processes against one process, and how its tokens are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_processes import module, run_ranks
from safetensors.torch import load_file
from torch import Tensor

from safelight.runtime.parallel.single_stream import TokenShare, rank_sizes

TOLERANCE = 1e-5
FILE = Path(__file__).with_name("zimage_ranks.py")
PROGRAM = module(FILE)
SCRIPTS = Path(__file__).parents[2] / "scripts"
WORLD = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    module(SCRIPTS / "make_checkpoint.py").make("z-image", folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(model: Path) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        results: dict[str, Tensor] = PROGRAM.run(*PROGRAM.loaded(model))
    return results


@pytest.fixture(scope="module")
def ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(FILE, WORLD, folder, model, folder)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(WORLD)]


@pytest.mark.parametrize("layout", PROGRAM.LAYOUTS, ids=str)
def test_every_rank_has_the_latents_of_one_rank(
    one_rank: dict[str, Tensor], ranks: list[dict[str, Tensor]], layout: tuple[int, int, int]
) -> None:
    size = layout[0] * layout[1] * layout[2]
    for batch, expected in one_rank.items():
        made = [result[f"{layout} {batch}"] for result in ranks[:size]]
        assert all(torch.equal(latents, made[0]) for latents in made)
        assert (made[0] - expected).abs().max() <= TOLERANCE


def test_the_jobs_differ_by_more_than_the_tolerance(one_rank: dict[str, Tensor]) -> None:
    first, second = one_rank["guided"]
    assert (first - second).abs().max() > 50 * TOLERANCE
    assert (second - one_rank["unguided"][0]).abs().max() > 50 * TOLERANCE


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (1, 2), (3, 1), (1, 5), (2, 3), (3, 2), (4, 4), (1, 17), (5, 8)])
@pytest.mark.parametrize("image", [32, 64, 4128])
@pytest.mark.parametrize("text", [32, 96, 512])
def test_shares_cover_both_kinds_of_tokens_and_have_the_sizes_that_attention_expects(
    ring: int, ulysses: int, image: int, text: int
) -> None:
    shares = [TokenShare.at(rank, ring, ulysses, image, text) for rank in range(ring * ulysses)]
    tokens = torch.arange(image), torch.arange(text)
    assert torch.equal(torch.cat([share.of_image(tokens[0], dim=0) for share in shares]), tokens[0])
    assert torch.equal(torch.cat([share.of_text(tokens[1], dim=0) for share in shares]), tokens[1])
    assert min(share.text_size for share in shares) >= 0
    assert [s.image_size for s in shares] == rank_sizes(image, ring, ulysses)
    assert [s.image_size + s.text_size for s in shares] == rank_sizes(image + text, ring, ulysses)
