"""Which layout a worker group gets: chosen, as asked, or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.configs.parallel import Degrees, WantedDegrees, check_implementations, choose_degrees, explain
from safelight.configs.server_args import ServerArgs
from safelight.runtime.errors import ConfigError
from safelight.runtime.launch.folders import create_run_folder
from safelight.runtime.launch.processes import Group
from safelight.runtime.launch.specs import check_layout, worker_spec
from safelight.runtime.messages import SlotPool


def chosen(world: int, heads: int, guided: bool, **flags: int) -> tuple[int, int, int]:
    degrees = choose_degrees(ServerArgs(num_gpus=world, **flags).wanted_degrees, heads, guided)  # type: ignore[arg-type]
    return degrees.cfg, degrees.ring, degrees.ulysses


@pytest.mark.parametrize(
    ("world", "heads", "guided", "expected"),
    [
        (1, 12, True, (1, 1, 1)),
        (2, 12, True, (2, 1, 1)),
        (2, 12, False, (1, 1, 2)),
        (3, 12, True, (1, 1, 3)),
        (8, 12, True, (2, 1, 4)),
        (6, 3, True, (2, 1, 3)),
        (8, 12, False, (1, 2, 4)),  # 8 ranks would have 2 or 1 of 12 heads
        (4, 5, False, (1, 4, 1)),
        (16, 40, True, (2, 1, 8)),
        (64, 40, True, (2, 4, 8)),
    ],
)
def test_guidance_is_split_first_then_heads_and_the_ring_takes_the_rest(
    world: int, heads: int, guided: bool, expected: tuple[int, int, int]
) -> None:
    assert chosen(world, heads, guided) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (2, 1, 4)),
        ({"cfg_parallel_degree": 1}, (1, 2, 4)),
        ({"sp_degree": 8}, (1, 2, 4)),
        ({"ulysses_degree": 2}, (2, 2, 2)),
        ({"ring_degree": 4}, (2, 4, 1)),
        ({"ulysses_degree": 8}, (1, 1, 8)),
        ({"ring_degree": 8}, (1, 8, 1)),
        ({"sp_degree": 4, "ring_degree": 2}, (2, 2, 2)),
        ({"cfg_parallel_degree": 1, "sp_degree": 8, "ring_degree": 4, "ulysses_degree": 2}, (1, 4, 2)),
    ],
)
def test_each_flag_decides_its_degree(flags: dict[str, int], expected: tuple[int, int, int]) -> None:
    assert chosen(8, 12, True, **flags) == expected


def test_the_degrees_are_those_of_each_replica() -> None:
    args = ServerArgs(num_gpus=8, replicas=2, ring_degree=2)
    assert choose_degrees(args.wanted_degrees, 12, True) == Degrees(2, 2, 1)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"num_gpus": 4, "ulysses_degree": 3}, ["--ulysses-degree 3", "--num-gpus 4"]),
        ({"num_gpus": 8, "sp_degree": 8, "cfg_parallel_degree": 2}, ["--cfg-parallel-degree 2", "--sp-degree 8"]),
        ({"num_gpus": 8, "sp_degree": 4, "ring_degree": 8}, ["--sp-degree 4", "--ring-degree 8"]),
        ({"num_gpus": 8, "ring_degree": 4, "ulysses_degree": 4}, ["--ring-degree 4", "--ulysses-degree 4"]),
        ({"num_gpus": 8, "sp_degree": 2}, ["--sp-degree 2", "--num-gpus 8"]),
        ({"num_gpus": 8, "replicas": 4, "sp_degree": 4}, ["--sp-degree 4", "--replicas 4"]),
        ({"num_gpus": 9, "cfg_parallel_degree": 3}, ["--cfg-parallel-degree 3", "cfg (1 or 2)"]),
        ({"sp_degree": 2}, ["--sp-degree 2", "--num-gpus 1"]),
    ],
)
def test_contradictory_degrees_name_both_flags(flags: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerArgs(**flags)
    assert all(name in caught.value.message for name in names), caught.value.message
    assert caught.value.param in flags


def test_more_ulysses_ranks_than_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"this model has 3 attention heads.*use at most 3"):
        chosen(8, 3, False, ulysses_degree=4)


@given(st.integers(1, 128), st.integers(1, 64), st.booleans())
def test_every_number_of_ranks_has_a_layout(world: int, heads: int, guided: bool) -> None:
    wanted = WantedDegrees(world, world)
    degrees = choose_degrees(wanted, heads, guided)
    assert degrees.world_size == world
    assert heads % degrees.ulysses == 0
    assert degrees.cfg == (2 if guided and world % 2 == 0 else 1)
    assert len(explain(degrees, wanted, heads, guided)) == 3


@pytest.mark.parametrize(
    ("sp_impl", "backend", "degrees", "device", "reason"),
    [
        ("yunchang", "auto", Degrees(1, 2, 1), "cpu", "its rings lose the log-sum-exp"),
        ("yunchang", "auto", Degrees(2, 1, 1), "cuda", "needs --sp-degree 2"),
        ("yunchang", "auto", Degrees(1, 2, 1), "cuda", "needs flash_attn and yunchang"),
        ("native", "fa", Degrees(), "cpu", "fa runs on CUDA"),
    ],
)
def test_implementations_that_cannot_run_are_refused_with_the_reason(
    sp_impl: str, backend: str, degrees: Degrees, device: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_implementations(sp_impl, backend, degrees, device)
    check_implementations("native", "auto", degrees, device)


CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": {"_class_name": "WanPipeline"},
    "transformer/config.json": {
        "num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960, "in_channels": 16,
        "text_dim": 4096,
    },
    "vae/config.json": {"dim_mult": [1, 2, 4, 4]},
    "text_encoder/config.json": {"d_model": 4096, "num_layers": 24, "num_heads": 64, "d_ff": 10240},
    "scheduler/scheduler_config.json": {"_class_name": "UniPCMultistepScheduler"},
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with the configs of Wan 2.1 1.3B."""
    for name, values in CONFIGS.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(json.dumps(values))
    return tmp_path / "model"


def test_the_flags_reach_every_rank(tmp_path: Path, model: Path) -> None:
    args = ServerArgs(
        num_gpus=8, replicas=2, ring_degree=2, ulysses_degree=2, tp_size=2, attention_backend="torch_sdpa"
    )
    run, pool = create_run_folder(tmp_path / "state"), SlotPool("x", 1, 1)
    spec = worker_spec(args, run, pool, model, "cpu", Group(0), 3)
    assert (spec.world_size, spec.cfg_degree, spec.ring_degree, spec.ulysses_degree) == (4, 1, 2, 2)
    assert (spec.tp_size, spec.encoder_sets) == (2, 2)
    assert (spec.attention_backend, spec.sp_impl) == ("torch_sdpa", "native")
    assert (spec.ulysses_transport, spec.cuda_graphs) == ("auto", True)
    other = dataclasses.replace(args, ulysses_transport="nccl", cuda_graphs=False)
    changed = worker_spec(other, run, pool, model, "cpu", Group(0), 3)
    assert (changed.ulysses_transport, changed.cuda_graphs) == ("nccl", False)
    with pytest.raises(ConfigError, match=r"--tp-size 128.*64 heads"):
        check_layout(ServerArgs(num_gpus=128, tp_size=128), model)
    with pytest.raises(ConfigError, match="--sp-impl yunchang runs on CUDA"):
        worker_spec(dataclasses.replace(args, sp_impl="yunchang"), run, pool, model, "cpu", Group(0), 3)
