"""What `serve` decides before it starts anything: keys, the socket, the size of frame slots."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from safelight.configs.families import FAMILIES, identify
from safelight.configs.http_args import HttpArgs
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.serve import api_keys, frame_bytes, listen, run
from safelight.runtime import hub
from safelight.runtime.errors import ConfigError, StartupError


def test_keys_come_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# a comment\nplain\n\nann: key:of:ann\n")
    args = HttpArgs(host="0.0.0.0", api_key_file=str(file))
    expected = (("local", "env"), ("local", "plain"), ("ann", "key:of:ann"))
    assert api_keys(args, {"SAFELIGHT_API_KEY": " env "}) == expected


def test_without_keys_only_this_host_is_served() -> None:
    assert api_keys(HttpArgs(), {}) == ()
    assert api_keys(HttpArgs(host="::1"), {"SAFELIGHT_API_KEY": ""}) == ()
    with pytest.raises(ConfigError, match="SAFELIGHT_API_KEY") as caught:
        api_keys(HttpArgs(host="192.0.2.1"), {})
    assert caught.value.param == "host"
    assert api_keys(HttpArgs(host="192.0.2.1"), {"SAFELIGHT_API_KEY": "k"}) == (("local", "k"),)


def test_code_of_a_checkpoint_is_refused_where_other_hosts_can_ask() -> None:
    with pytest.raises(ConfigError, match=r"--trust-remote-code with --host 0\.0\.0\.0") as caught:
        run(HttpArgs(host="0.0.0.0", port=0), ServerArgs(trust_remote_code=True))
    assert caught.value.param == "trust_remote_code"


def test_a_taken_port_and_a_host_of_elsewhere_are_refused() -> None:
    with listen(HttpArgs(port=0)) as first, pytest.raises(StartupError, match="choose another --port"):
        listen(HttpArgs(port=first.getsockname()[1]))
    with pytest.raises(StartupError, match="cannot listen"):
        listen(HttpArgs(host="192.0.2.1", port=0))
    with pytest.raises(StartupError, match="check --host"):
        listen(HttpArgs(host="no.such.host.invalid", port=0))


def test_a_frame_slot_holds_the_largest_chunk_of_any_allowed_request() -> None:
    spec = identify(hub.builtin_model())
    slot = frame_bytes(spec, 256 * 256)
    for frames in (1, 5, 17, 81):
        params = dataclasses.replace(spec.defaults, height=256, width=256, num_frames=frames, seed=1)
        assert FAMILIES[spec.family].profile(spec, params).chunk_bytes <= slot
