"""scripts/bench_parallel.py on two gloo processes: every part runs, and a part that fails does not lose the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_processes import module

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, the results, and the table."""
    command = [sys.executable, str(SCRIPTS / "bench_parallel.py"), "--device", "cpu", "--tiny", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    lines = done.stdout.splitlines()
    results = [json.loads(line) for line in lines if line.startswith('{"')]
    assert results, done.stderr
    return done.returncode, results, "\n".join(line for line in lines if line.startswith("|"))


def test_every_part_is_measured_on_gloo_and_a_failing_one_is_reported() -> None:
    parts = "check,links,step,diffusers,vae,images"
    code, results, table = run("--reps", "1", "--layouts", "1x2x1,1x1x2", "--parts", parts)
    by_part: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_part.setdefault(result["part"], []).append(result)
    assert set(by_part) == set(parts.split(","))
    assert by_part["check"][0]["ok"]
    assert by_part["check"][0]["heads 5, 3 tokens"]["1x2x1"]["fp32_max"] < 1e-5
    assert [r["layout"] for r in by_part["step"]] == ["1x1x1", "1x2x1", "1x1x2"]
    for shared in by_part["step"][1:]:
        assert shared["trace"]["exposed_ms"] + shared["trace"]["hidden_ms"] > 0
        assert shared["sent_mb"] > 0
        assert shared["layout"] in table
    assert "error" in by_part["diffusers"][1]  # it cannot run on a CPU
    assert by_part["vae"][0]["largest_difference"] <= 1
    assert [r["model"] for r in by_part["images"]] == ["FLUX.1-dev"] * 3 + ["Qwen-Image"] * 3
    assert all(r["ms"] > 0 for r in by_part["images"])
    distances = {(r["model"], r["layout"]): r["from_alone_l2"] for r in by_part["images"]}
    assert max(distances.values()) < 0.03  # bfloat16
    assert all(distances[model, "1x2x1"] > distances[model, "1x1x1"] == 0 for model, _ in distances)
    assert code == 1


def test_what_the_budget_has_no_time_for_is_said() -> None:
    _, results, _ = run("--budget-s", "0.5", "--parts", "links,vae")
    assert [r["part"] for r in results] == ["links", "vae"]
    assert all("budget is spent" in r.get("error", r.get("skipped", "")) for r in results)


@pytest.fixture
def trace() -> Any:
    return module(SCRIPTS / "parallel_trace.py")


def test_a_trace_is_taken_apart(trace: Any) -> None:
    events = [
        {"name": "nvjet_hsh_128x256", "ts": 0.0, "dur": 4000.0},
        {"name": "ncclDevKernel_SendRecv(x)", "ts": 3000.0, "dur": 3000.0},  # a third of it hidden
        {"name": "cudnn_generated_fort_native_sdpa_sm90", "ts": 7000.0, "dur": 3000.0},
        {"name": "ncclDevKernel_SendRecv(x)", "ts": 8000.0, "dur": 1000.0},  # all of it
    ]
    found = trace.summary(events)
    assert {k: found[k] for k in ("span_ms", "exposed_ms", "hidden_ms", "idle_ms")} == {
        "span_ms": 10.0, "exposed_ms": 2.0, "hidden_ms": 2.0, "idle_ms": 1.0,
    }  # fmt: skip
    assert found["kinds_ms"] == {"communication": 4.0, "products": 4.0, "attention": 3.0}
    assert found["share"] == 0.2


def test_an_empty_trace_is_an_error(trace: Any) -> None:
    assert "error" in trace.summary([])
