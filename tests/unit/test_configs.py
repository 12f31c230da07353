"""Options, config files and environment variables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from safelight.configs.config_file import load_config
from safelight.configs.env import TorchrunRank, from_environment, interface_variables, torchrun_rank
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.http_args import HttpArgs
from safelight.configs.network import address_towards, free_ports, interface_address
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.server_args import ServerArgs
from safelight.configs.worker_args import WorkerArgs
from safelight.entrypoints.jobs import request_of
from safelight.runtime.errors import ConfigError, InvalidRequest
from safelight.runtime.messages import MediaFormat, MediaSpec
from safelight.runtime.text.raw import RawPrompts

CONFIGS = (SamplingParams, GenerateArgs, ServerArgs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "fiar"}, "did you mean 'fair'"),
        ({"num_gpus": "2"}, "--num-gpus: an integer expected, got '2'"),
        ({"num_gpus": True}, "--num-gpus: an integer expected, got True"),
        ({"num_gpus": 0}, "--num-gpus: at least 1"),
        ({"num_gpus": 3, "replicas": 2}, "does not divide"),
        ({"max_plan_ms": float("nan")}, "--max-plan-ms"),
        ({"device": "tpu"}, "one of auto, cuda, cpu"),
        ({"dit_precision": "int8"}, "--dit-precision"),
        ({"frame_slots": None}, "--frame-slots"),
        ({"worker_endpoint": "udp://10.0.0.1:5000"}, "--worker-endpoint: tcp://HOST:PORT"),
        ({"worker_endpoint": "tcp://10.0.0.1:65534", "keys": "k"}, "a port up to 65533"),
        ({"worker_endpoint": "tcp://0.0.0.0:5000", "keys": "k"}, "numeric address of a private interface"),
        ({"worker_endpoint": "tcp://node:5000", "keys": "k"}, "got 'node'"),
        ({"keys": None, "worker_endpoint": "tcp://10.0.0.1:5000"}, "tcp needs --keys DIR"),
        ({"interface": "none0"}, "no network interface 'none0'; it has lo"),
    ],
)
def test_wrong_server_args_name_the_flag(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ServerArgs(**values)
    assert caught.value.param in values


def test_a_workers_flags_are_checked() -> None:
    with pytest.raises(ConfigError, match="--scheduler: tcp://HOST:PORT of a running server"):
        WorkerArgs()
    with pytest.raises(ConfigError, match="tcp needs --keys DIR"):
        WorkerArgs(scheduler="tcp://10.0.0.1:5000")
    assert WorkerArgs(scheduler="tcp://login-node:5000", keys="k").endpoint == "tcp://login-node:5000"


def test_torchruns_environment_is_read_and_a_process_without_it_is_told_how_to_start() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
    environ |= {"TORCHELASTIC_RUN_ID": "a", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
    assert torchrun_rank(environ) == TorchrunRank(3, 4, 1, 2, 2, "a", "n0", 29500)
    with pytest.raises(ConfigError, match="started by torchrun"):
        torchrun_rank({})


def test_the_interface_goes_to_gloo_and_nccl_and_must_not_contradict_the_environment() -> None:
    assert interface_variables(None, {}) == {}
    assert interface_variables("lo", {}) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    with pytest.raises(ConfigError, match="none0"):
        interface_variables("none0", {})
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME=eth9"):
        interface_variables("lo", {"GLOO_SOCKET_IFNAME": "eth9"})


def test_addresses_and_ports_are_found() -> None:
    assert interface_address("lo") == "127.0.0.1"
    assert address_towards("127.0.0.1", 1) == "127.0.0.1"
    assert 0 < free_ports("127.0.0.1", 3) <= 65533


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 70_000}, "--port: at most 65535"),
        ({"port": -1}, "--port: at least 0"),
        ({"host": " "}, "--host"),
        ({"max_pixels": 0}, "--max-pixels"),
        ({"max_frames": 0}, "--max-frames"),
        ({"max_steps": 0}, "--max-steps"),
        ({"max_outputs": 0}, "--max-outputs"),
        ({"max_body_mb": 0}, "--max-body-mb"),
    ],
)
def test_wrong_http_args_name_the_flag(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        HttpArgs(**values)
    assert caught.value.param in values


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
)
def test_only_this_host_reaches_a_loopback_address(host: str, expected: bool) -> None:
    assert HttpArgs(host=host).is_loopback is expected


def test_replicas_share_the_workers() -> None:
    assert ServerArgs(num_gpus=8, replicas=2).group_size == 4


def test_wrong_types_of_sampling_params_are_invalid_requests() -> None:
    with pytest.raises(InvalidRequest, match=r"--height: an integer expected, got 1\.5"):
        SamplingParams(height=1.5)  # type: ignore[arg-type]
    assert SamplingParams(guidance_scale=4).guidance_scale == 4


@pytest.mark.parametrize(
    ("values", "frames", "expected"),
    [
        ({}, 1, "png"),
        ({}, 17, "mp4"),
        ({"output_format": "webp"}, 1, "webp"),
        ({"output_file_name": "a.JPG"}, 1, "jpeg"),
        ({"output_file_name": "a.jpeg", "output_format": "jpeg"}, 1, "jpeg"),
        ({"output_file_name": "v1.5"}, 1, "png"),
        ({"output_file_name": "png"}, 5, "mp4"),
        ({"output_format": "npy"}, 5, "npy"),
    ],
)
def test_the_format_follows_flag_name_and_frames(values: dict[str, Any], frames: int, expected: str) -> None:
    assert GenerateArgs(**values).media_format(frames) == expected


@pytest.mark.parametrize("values", [{"output_format": "png"}, {"output_file_name": "a.webp"}])
def test_a_still_format_for_a_video_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"holds one picture, not 5 frames; use mp4"):
        GenerateArgs(**values).media_format(5)


@pytest.mark.parametrize(
    "values",
    [
        {"output_file_name": "a/b.png"},
        {"output_file_name": ".."},
        {"output_file_name": " "},
        {"output_file_name": "ä" * 200},
        {"output_file_name": "a.png", "output_format": "webp"},
        {"output_quality": 101},
        {"output_quality": -1},
        {"output_format": "gif"},
    ],
)
def test_contradictory_output_options_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GenerateArgs(**values)


@pytest.mark.parametrize("name", ["c.json", "c.yaml", "c.yml"])
def test_a_config_file_takes_either_spelling(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps({"num-frames": 5, "guidance_scale": 3, "policy": "sjf", "seed": None}))
    assert load_config(path, CONFIGS) == {"num_frames": 5, "guidance_scale": 3, "policy": "sjf"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_framse: 5", "unknown key 'num_framse'; did you mean 'num_frames'"),
        ("height: tall", "--height: an integer expected, got 'tall'"),
        ("height: true", "--height: an integer expected, got True"),
        ("save_output: 'yes'", "--save-output: true or false expected"),
        ("num-frames: 5\nnum_frames: 9", "is there twice"),
        ("policy: fastest", "one of fair, fcfs, sjf"),
        ("- a", "names and values expected at the top, got list"),
        ("a: [", "is not YAML"),
        ("1: 2", "unknown key 1"),
    ],
)
def test_wrong_config_files_name_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, CONFIGS)
    assert str(path) in caught.value.message


def test_a_config_file_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("prompt: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path, CONFIGS)


def test_a_missing_config_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.json", CONFIGS)


def test_environment_variables_of_ours_win_over_sglangs() -> None:
    environ = {
        "SGLANG_DIFFUSION_TARGET_DEVICE": "CUDA",
        "SAFELIGHT_DEVICE": "cpu",
        "SAFELIGHT_LOG_LEVEL": "",
        "HOME": "/",
    }
    assert from_environment(environ) == {"device": "cpu"}
    assert from_environment({"SGLANG_DIFFUSION_LOGGING_LEVEL": "INFO"}) == {"log_level": "info"}


def test_an_unknown_variable_of_ours_is_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'SAFELIGHT_DEVICE'"):
        from_environment({"SAFELIGHT_DEVIEC": "cpu"})


def test_the_parameters_of_a_request_are_those_that_it_was_made_of() -> None:
    params = SamplingParams(
        prompt="a", negative_prompt="b", height=3, width=4, num_frames=5, fps=6, num_inference_steps=7,
        guidance_scale=8.0, seed=9, num_outputs_per_prompt=10, sampler="c", true_cfg_scale=11.0,
        cfg_normalization=12.0, cfg_truncation=13.0, previews=14,
    )  # fmt: skip
    assert None not in dataclasses.astuple(params)
    assert SamplingParams.of(request_of(RawPrompts(), params, MediaSpec(MediaFormat.PNG))) == params
