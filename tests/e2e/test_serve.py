"""`safelight serve` as users start it: its start and end, the OpenAI SDK, and what survives which death."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image
from served import Served, serve

from safelight.runtime import hub

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SUPPORT = Path(__file__).resolve().parents[1] / "support"
LONG = {"prompt": "a cat", "num_frames": 5, "size": "32x32", "num_inference_steps": 400, "seed": 3}


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path) -> Iterator[Served]:
    """A server of the tiny model with a state folder."""
    flags = ("--model-path", str(tiny_model), "--state-dir", str(tmp_path / "state"), "--checkpoint-every", "50")
    with serve(*flags) as served:
        yield served


def video(http: httpx2.Client, **changes: Any) -> str:
    reply = http.post("/v1/videos", json={**LONG, **changes})
    assert reply.status_code == 200, reply.text
    name: str = reply.json()["id"]
    return name


def finished(served: Served, job: str) -> bytes:
    """The file of a completed video."""
    end = served.until(f"/v1/videos/{job}", lambda v: v is not None and v.get("status") in ("completed", "failed"), 120)
    assert end["status"] == "completed", end
    with served.http() as http:
        return http.get(f"/v1/videos/{job}/content").content


def denoising(served: Served, job: str) -> None:
    served.until(f"/v1/videos/{job}", lambda v: v is not None and v.get("progress", 0) > 5)


# ---- start and end


def refused(*flags: str) -> str:
    """What a `serve` that cannot start says."""
    command = [sys.executable, "-m", "safelight", "serve", "--device", "cpu", *flags]
    environ = {name: value for name, value in os.environ.items() if name != "SAFELIGHT_API_KEY"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    assert ended.returncode in (1, 2), ended
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another --port" in refused("--port", str(taken.getsockname()[1]))
    assert "--api-key-file" in refused("--host", "0.0.0.0", "--port", "0")
    assert "cannot be read" in refused("--api-key-file", str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\n")
    assert "one key a line" in refused("--api-key-file", str(tmp_path / "empty"))


def test_a_second_server_on_the_same_state_folder_is_refused(tiny: Served, tiny_model: Path, tmp_path: Path) -> None:
    told = refused("--model-path", str(tiny_model), "--port", "0", "--state-dir", str(tmp_path / "state"))
    assert "in use by another server" in told
    tiny.healthy()


def test_terminate_drains_and_an_interrupt_stops_at_once(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--model-path", str(tiny_model), "--state-dir", str(tmp_path / "state"))
    with serve(*flags, module="safelight.entrypoints.launch_server") as served, served.http() as http:
        job = video(http)
        denoising(served, job)
        served.process.send_signal(signal.SIGTERM)
        served.until("/ready", lambda found: found is not None and found["draining"])
        assert http.post("/v1/videos", json=LONG).status_code == 503
        assert http.get("/ready").status_code == 503
        assert served.process.wait(60) == 0
    with serve(*flags) as served, served.http() as http:
        assert http.get(f"/v1/videos/{job}").json()["status"] == "completed"
        job = video(http)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(30) == 130


def test_another_host_is_served_with_a_key(tiny_model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# who may\nann:secret\n")
    flags = ("--model-path", str(tiny_model), "--host", "0.0.0.0", "--api-key-file", str(keys))
    with serve(*flags, ready=False) as served:
        served.url = served.said(r"listening on (http://\S+);")[1].replace("0.0.0.0", "127.0.0.1")
        served.said("ready")
        assert httpx2.get(served.url + "/v1/models").status_code == 401
        assert httpx2.get(served.url + "/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


# ---- the SDK


def sdk_folder(version: str) -> Path | None:
    """Where that version of the SDK is, or None for the one of this environment; skips when it cannot be had."""
    if version == openai.__version__:
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "safelight-tests"
    folder = cache / f"openai-{version}-py{sys.version_info.minor}"
    if not folder.is_dir():
        partial = cache / f".{folder.name}.{os.getpid()}"
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(partial), f"openai=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        if done.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            pytest.skip(f"openai {version} cannot be installed here: {done.stderr[-300:]}")
        with contextlib.suppress(OSError):  # another test run was faster
            partial.rename(folder)
    return folder


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The built-in model under an id with a slash."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "org").mkdir()
    (folder / "org" / "builtin").symlink_to(hub.builtin_model())
    with serve("--model-path", "org/builtin", cwd=folder) as served:
        yield served


@pytest.mark.parametrize("version", ["2.54.0", "3.51.0", "3.54.0"])
def test_the_openai_sdk_works_unmodified(builtin: Served, editor: tuple[Served, Path], version: str) -> None:
    folder = sdk_folder(version)
    paths = [str(folder)] if folder else [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(SUPPORT / "sdk_rows.py"), builtin.url, "org/builtin"]
    command += [editor[0].url, str(editor[1] / "photo.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == version
    assert len(found["rows"]) >= 44
    failed = {name: result for name, result in found["rows"].items() if result != "pass"}
    assert not failed, "\n".join(f"{name}: {result}" for name, result in failed.items())


def test_a_videos_events_tell_stages_steps_previews_and_the_end(builtin: Served) -> None:
    body = {"prompt": "a yellow car moving left", "num_frames": 5, "num_inference_steps": 6, "partial_images": 2}
    with builtin.http() as http:
        job = video(http, size="128x128", **body)
        with http.stream("GET", f"/v1/videos/{job}/events") as reply:
            lines = [line for line in reply.iter_lines() if line.startswith(("event: ", "data: "))]
    events = [(name[7:], json.loads(data[6:])) for name, data in zip(lines[::2], lines[1::2], strict=True)]
    told = [data for name, data in events if name == "video.progress"]
    assert {data["stage"] for data in told} >= {"denoising", "decoding"}
    steps = [(data["step"], data["steps"]) for data in told if data["stage"] == "denoising"]
    assert steps == sorted(steps)
    assert steps[-1] == (6, 6)
    previews = [data for name, data in events if name == "video.partial_image"]
    assert [(data["partial_image_index"], data["step"]) for data in previews] == [(0, 2), (1, 4)]
    for data in previews:
        with Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) as picture:
            assert (picture.format, picture.size) == ("JPEG", (128, 128))
            assert np.asarray(picture).std() > 10, "a picture that is not flat"
    assert events[-1][0] == "video.completed"
    assert events[-1][1]["progress"] == 100


# ---- deaths


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_death_or_hang_of_any_process_shows_in_health_and_loses_no_video(
    tiny: Served, number: signal.Signals
) -> None:
    with tiny.http() as http:
        expected = finished(tiny, video(http))
        for role in ("frontend", "scheduler", "output", "worker 0"):
            jobs = [video(http) for _ in range(2)]
            denoising(tiny, jobs[0])
            dead = tiny.signal(role, number)
            tiny.unwell(role, dead)
            tiny.healthy()
            assert tiny.pids()[role] != dead
            assert [finished(tiny, job) for job in jobs] == [expected] * 2, role


def test_videos_survive_the_death_of_everything(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--model-path", str(tiny_model), "--state-dir", str(tmp_path / "state"), "--checkpoint-every", "50")
    with serve(*flags) as served, served.http() as http:
        done = video(http)
        expected = finished(served, done)
        jobs = [video(http) for _ in range(3)]
        denoising(served, jobs[0])
        for role, pid in served.pids().items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            assert role
    with serve(*flags) as served, served.http() as http:
        assert [finished(served, job) for job in (done, *jobs)] == [expected] * 4
        assert [v["id"] for v in http.get("/v1/videos?order=asc").json()["data"]] == [done, *jobs]


def test_a_picture_is_answered_though_control_processes_die_under_it(tiny: Served) -> None:
    body = {"prompt": "a cat", "size": "32x32", "num_inference_steps": 400, "seed": 3}
    with tiny.http() as http, ThreadPoolExecutor(1) as pool:
        expected = http.post("/v1/images/generations", json=body).json()["data"]
        for role in ("scheduler", "output", "worker 0"):
            reply = pool.submit(http.post, "/v1/images/generations", json=body)
            tiny.until("/ready", lambda found: found is not None and found["running"] == 1)
            tiny.signal(role)
            data = reply.result().json()["data"]
            assert data[0]["b64_json"] == expected[0]["b64_json"], role


# ---- load


def test_a_short_picture_is_answered_while_a_long_video_runs(tiny: Served) -> None:
    with tiny.http() as http:
        long = video(http, num_inference_steps=500, num_frames=17, size="96x96")
        denoising(tiny, long)
        short = {"prompt": "a cat", "size": "32x32", "num_inference_steps": 4}
        assert http.post("/v1/images/generations", json=short).status_code == 200
        assert http.get(f"/v1/videos/{long}").json()["status"] == "in_progress"
        http.delete(f"/v1/videos/{long}")


def resident_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def test_five_hundred_aborts_leak_neither_jobs_nor_slots_nor_memory(tiny: Served) -> None:
    body = {"prompt": "a cat", "size": "32x32", "num_inference_steps": 400}

    def abort(number: int) -> None:
        with socket.create_connection(("127.0.0.1", int(tiny.url.rpartition(":")[2]))) as connection:
            content = json.dumps({**body, "seed": number}).encode()
            head = f"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            threading.Event().wait(0.002 * (number % 25))  # some in the queue, some in the middle of a step

    def aborts(first: int, count: int) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(abort, range(first, first + count)))
        tiny.until("/ready", lambda found: found is not None and (found["queued"], found["running"]) == (0, 0))

    roles = ("frontend", "scheduler", "output", "worker 0")
    with tiny.http() as http:
        aborts(0, 250)
        pids = tiny.pids()
        before = {role: resident_kb(pids[role]) for role in roles}
        aborts(250, 250)
        assert tiny.pids() == pids, "nothing died"
        after = {role: resident_kb(pids[role]) for role in roles}
        assert all(after[role] - before[role] < 8_000 for role in roles), (before, after)
        with ThreadPoolExecutor(6) as pool:  # more than there are slots
            jobs = list(pool.map(lambda seed: video(http, seed=seed, num_inference_steps=4), range(6)))
        assert all(finished(tiny, job) for job in jobs)


def stored(folder: Path) -> float:
    """Bytes; infinitely many while files are being deleted."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return float("inf")


def test_expired_results_and_those_above_the_quota_are_deleted(tiny_model: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    flags = ("--model-path", str(tiny_model), "--state-dir", str(state), "--artifact-quota-mb", "0.02")
    with serve(*flags) as served, served.http() as http:
        jobs = [video(http, seed=seed, num_inference_steps=2) for seed in range(8)]
        for job in jobs:
            served.until(f"/v1/videos/{job}", lambda v: v is not None and v.get("status") != "queued")
        served.until("/ready", lambda found: found is not None and (found["queued"], found["running"]) == (0, 0), 120)
        served.until("/ready", lambda _: stored(state / "artifacts") <= 20_000, 20)  # swept within a second
        kept = [v["id"] for v in http.get("/v1/videos?order=asc").json()["data"]]
        assert 0 < len(kept) < 8
        assert kept == jobs[-len(kept) :]
        files = list((state / "artifacts").iterdir())
        assert {file.name[:26] for file in files} == set(kept)
    with serve(*flags, "--artifact-ttl-s", "1") as served, served.http() as http:
        served.until("/v1/videos", lambda found: found is not None and found["data"] == [])
        assert not list((state / "artifacts").iterdir())
