"""The serving bench against the fake backend, and its figures."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fake_backend import FakeBackend, http_server


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / "bench_serving.py"
    spec = importlib.util.spec_from_file_location("bench_serving", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_serving"] = module
    spec.loader.exec_module(module)
    return module


def test_a_run_counts_every_job_of_the_mix(bench: ModuleType, tmp_path: Path) -> None:
    with FakeBackend(tmp_path) as backend, http_server(backend) as url:
        flags = ["--url", url, "--rate", "40", "--seconds", "1", "--mix", "image:2:128x128:1:3", "video:2:128x128:17"]
        found = asyncio.run(bench.measure(bench.parser().parse_args(flags)))
    assert found["errors"] == {}
    assert found["jobs"] == sum(kind["jobs"] for kind in found["kinds"].values()) == len(backend.executions) - 6
    assert found["idle_share"] == 1.0


def test_goodput_counts_what_met_its_objective(bench: ModuleType) -> None:
    kind = bench.Kind.parse("image:2:128x128:1")
    outcomes = [bench.Outcome(kind, seconds) for seconds in (1.0, 2.0, 9.0)] + [bench.Outcome(kind, 1.0, "429")]
    found = bench.summary(outcomes, {kind.name: 1.0}, 5.0, 10.0, None)
    assert (found["slo_attainment"], found["goodput_per_s"], found["errors"]) == (0.5, 0.2, {"429": 1})
    assert (found["kinds"][kind.name]["p50_s"], found["kinds"][kind.name]["p99_s"]) == (2.0, 9.0)


@pytest.mark.parametrize(("percent", "expected"), [(50, 5), (95, 10), (99, 10), (10, 1)])
def test_percentiles_are_by_nearest_rank(bench: ModuleType, percent: int, expected: int) -> None:
    assert bench.percentile(range(1, 11), percent) == expected
