"""scripts/simulate_scheduler.py: the real core over long mixed loads."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate_scheduler.py"


@pytest.fixture(scope="module")
def simulator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_scheduler", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(600)
def test_twenty_thousand_jobs_end_once_each_under_fair(simulator: ModuleType) -> None:
    simulation = simulator.Simulation("fair", 20_000, groups=4, load=0.85, deaths_per_hour=2.0, seed=1)
    report = simulation.run()
    assert sum(len(times) for times in report.latencies.values()) + sum(report.missed.values()) == 20_000
    assert report.deaths > 0
    assert report.as_dict()["slo"] > 0.95
    state = simulation.core.state
    assert not state.jobs
    assert len(state.slots.free) == 16


def test_short_jobs_wait_far_less_under_fair_than_under_fcfs_and_long_ones_do_not_starve(simulator: ModuleType) -> None:
    runs = {
        name: simulator.Simulation(name, 1500, groups=2, load=0.9, deaths_per_hour=0.0, seed=2).run()
        for name in ("fcfs", "fair", "sjf")
    }
    p99 = {name: simulator.quantile(run.latencies["image"], 0.99) for name, run in runs.items()}
    assert p99["fair"] < p99["fcfs"] / 4
    longest = {name: max(run.latencies["long video"]) for name, run in runs.items()}
    assert longest["fair"] < longest["sjf"]


def test_overload_refuses_and_cancels_but_loses_nothing(simulator: ModuleType) -> None:
    report = simulator.Simulation("fair", 1000, groups=1, load=3.0, deaths_per_hour=20.0, seed=3).run()
    assert sum(len(times) for times in report.latencies.values()) + sum(report.missed.values()) == 1000


def test_it_prints_a_json_line_per_policy_and_a_table(
    simulator: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    simulator.main(["--jobs", "60", "--groups", "1", "--policy", "sjf", "fair"])
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["policy"] for line in lines[:2]] == ["sjf", "fair"]
    assert {"slo", "idle", "events_per_s", "classes"} <= set(json.loads(lines[0]))
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["sjf", "fair"]
