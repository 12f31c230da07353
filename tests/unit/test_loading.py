"""Checkpoint files, whole and broken, into modules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.kernels.dispatch import reference_kernels
from safelight.runtime.errors import ModelError
from safelight.runtime.models.loading import checkpoint_files, load_weights, read_json
from safelight.runtime.models.registry import LoadOptions
from safelight.runtime.models.wan.transformer import WanConfig, WanTransformer
from safelight.runtime.models.wan.weights import load_transformer, name_map
from safelight.runtime.parallel.mesh import ParallelMesh

STEM = "diffusion_pytorch_model"
CONFIG = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 8, "ffn_dim": 16, "num_layers": 2, "patch_size": [1, 2, 2],
}  # fmt: skip
OPTIONS = LoadOptions(torch.device("cpu"), torch.bfloat16, torch.float32, None, ParallelMesh.single())


def published() -> dict[str, Tensor]:
    """Random tensors under the published names, in the published shapes."""
    config = WanConfig.from_json(CONFIG)
    shapes = {
        n: p.shape for n, p in WanTransformer(config, ParallelMesh.single(), reference_kernels()).named_parameters()
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for target, sources in name_map(config).items():
        rows, *rest = shapes[target]
        for source in sources:
            shape = [rows // len(sources), *rest]
            if source == "patch_embedding.weight":
                shape = [rows, 4, 1, 2, 2]
            tensors[source] = torch.randn(shape, generator=generator)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if shards == 1:
        save_file(tensors, folder / f"{STEM}.safetensors")
        return folder
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"{STEM}-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives_fused_and_in_its_dtype(tmp_path: Path, shards: int) -> None:
    tensors = published()
    state = load_transformer(write(tmp_path / "t", tensors, shards), OPTIONS).state_dict()
    block = "blocks.1."
    fused = torch.cat([tensors[f"{block}attn1.to_{x}.weight"] for x in "qkv"])
    assert torch.equal(state[f"{block}self_attention.qkv.weight"], fused.bfloat16())
    fused = torch.cat([tensors[f"{block}attn2.to_{x}.bias"] for x in "kv"])
    assert torch.equal(state[f"{block}cross_attention.kv.bias"], fused.bfloat16())
    assert torch.equal(state["patch_embedding.weight"], tensors["patch_embedding.weight"].flatten(1).bfloat16())
    wide = {name for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in state if re.search(r"modulation|time_embedding|cross_norm", name)}
    assert torch.equal(state[f"{block}modulation"], tensors[f"{block}scale_shift_table"])


def test_nothing_stays_on_the_meta_device(tmp_path: Path) -> None:
    model = load_transformer(write(tmp_path / "t", published()), OPTIONS)
    assert all(not tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_tensors_of_unused_layers_in_published_files_are_ignored(tmp_path: Path) -> None:
    tensors = published() | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}
    load_transformer(write(tmp_path / "t", tensors), OPTIONS)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = published()
    del tensors["blocks.1.attn1.to_k.bias"]
    with pytest.raises(ModelError, match=r"1 tensors are missing, the first is blocks\.1\.attn1\.to_k\.bias"):
        load_transformer(write(tmp_path / "t", tensors), OPTIONS)


def test_extra_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    tensors = published() | {"blocks.7.ffn.net.2.bias": torch.ones(24)}
    with pytest.raises(ModelError, match=rf"{STEM}\.safetensors: .* the first is blocks\.7\.ffn\.net\.2\.bias"):
        load_transformer(write(tmp_path / "t", tensors), OPTIONS)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("proj_out.weight", (16, 23)),
        ("proj_out.weight", (24, 16)),
        ("blocks.0.attn1.to_v.weight", (25, 24)),
        ("patch_embedding.weight", (24, 4, 2, 2, 2)),
        ("scale_shift_table", (2, 24)),
        ("blocks.0.norm2.bias", ()),
    ],
)
def test_tensor_of_a_wrong_shape_is_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = published() | {name: torch.ones(shape)}
    with pytest.raises(ModelError, match=rf"{re.escape(name)}.* do not make up a parameter of shape"):
        load_transformer(write(tmp_path / "t", tensors), OPTIONS)


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_corrupt_file_is_named(tmp_path: Path, keep: int) -> None:
    folder = write(tmp_path / "t", published())
    file = folder / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=rf"{STEM}\.safetensors is not a readable safetensors file"):
        load_transformer(folder, OPTIONS)


def test_file_with_a_header_of_absurd_length_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", published())
    file = folder / f"{STEM}.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_transformer(folder, OPTIONS)


def test_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"has neither {STEM}\.safetensors nor"):
        checkpoint_files(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", published(), shards=3)
    (folder / f"{STEM}-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"00002-of-00003\.safetensors, which is missing"):
        load_transformer(folder, OPTIONS)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hosts"])
def test_index_cannot_name_a_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="a plain file name expected"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}'])
def test_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json"):
        checkpoint_files(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(ModelError, match=r"weight is also in a\.safetensors"):
        load_weights(nn.Module(), files, {}, torch.device("cpu"), lambda _: torch.float32)


def test_json_that_is_no_object_or_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for data in (b"3", b"\xff\xfe\x00", b"[" * 100_000):
        file.write_bytes(data)
        with pytest.raises(ModelError, match=r"config\.json"):
            read_json(file)
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path / "absent.json")
