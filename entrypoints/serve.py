"""`safelight serve`: keeps a model loaded and answers HTTP until it is told to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from safelight.configs.backend import refuse_remote_code
from safelight.configs.env import api_key
from safelight.configs.families import FAMILIES, ModelSpec, identify
from safelight.configs.http_args import HttpArgs
from safelight.configs.server_args import ServerArgs
from safelight.entrypoints import address_card
from safelight.entrypoints.interrupts import Interrupted, Interrupts
from safelight.entrypoints.model_path import find_root, with_local_vae
from safelight.runtime import logs
from safelight.runtime.errors import ConfigError, InvalidRequest, StartupError
from safelight.runtime.launch.devices import resolve_device
from safelight.runtime.launch.folders import INPUTS
from safelight.runtime.launch.specs import check_layout, precisions
from safelight.runtime.launch.supervisor import Supervisor
from safelight.runtime.messages import Endpoints, FrontendSpec, RequestLimits, ServedModel

MIN_PIXELS = 1024 * 1024  # what is allowed of any model
BACKLOG = 2048  # connections that the kernel keeps, also while the frontend is started again
_LOOK_S = 0.5


def run(http: HttpArgs, args: ServerArgs) -> int:
    """The exit code. Raises SafelightError when the server could not start or cannot go on."""
    logs.configure("serve", args.log_level)
    refuse_remote_code(args, http)
    keys = api_keys(http, os.environ)
    try:
        with listen(http) as listening, Interrupts() as interrupts:
            return _Serve(http, args, keys, listening).run(interrupts)
    except Interrupted as interrupted:
        return 0 if interrupted.exit_code == 128 + signal.SIGTERM else interrupted.exit_code


def api_keys(http: HttpArgs, environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """(owner, key) of each key; none on a loopback address without any. Raises ConfigError."""
    found = [("local", key)] if (key := api_key(environ)) else []
    if http.api_key_file is not None:
        path = Path(http.api_key_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file: {path} cannot be read: {error}", param="api_key_file") from error
        entries = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        found += [_owner_and_key(entry) for entry in entries]
        if not entries or not all(key for _, key in found):
            raise ConfigError(f"--api-key-file: one key a line expected in {path}", param="api_key_file")
    if not found and not http.is_loopback:
        raise ConfigError(
            f"--host {http.host}: other hosts could use this server; give it --api-key-file (or SAFELIGHT_API_KEY), or "
            "listen on 127.0.0.1",
            param="host",
        )
    return tuple(found)


def _owner_and_key(entry: str) -> tuple[str, str]:
    owner, colon, key = entry.partition(":")
    return (owner.strip() or "local", key.strip()) if colon else ("local", entry)


def listen(http: HttpArgs) -> socket.socket:
    """The listening socket, made before anything is loaded. Raises StartupError when the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"cannot listen on {http.host}: {error}; check --host") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by every connection
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise StartupError(
            f"cannot listen on {http.host} port {http.port}: {error.strerror}; choose another --port"
        ) from error
    return listening


def most_pixels(spec: ModelSpec) -> int:
    """Of a result, where no limit is given: twice the model's default size."""
    return max(MIN_PIXELS, 2 * (spec.defaults.height or 0) * (spec.defaults.width or 0))


def frame_bytes(spec: ModelSpec, max_pixels: int) -> int:
    """The largest chunk of decoded frames of any request within the limits."""
    family, params = FAMILIES[spec.family], spec.defaults
    largest = family.profile(spec, params).chunk_bytes
    for frames in range(2, 34):  # a video's chunks may be larger than a picture
        video = dataclasses.replace(params, num_frames=frames)
        with contextlib.suppress(InvalidRequest):
            family.validate(spec, dataclasses.replace(video, seed=0))
            largest = max(largest, family.profile(spec, video).chunk_bytes)
    return math.ceil(largest / ((params.height or 1) * (params.width or 1))) * max_pixels


class _Serve:
    """One `serve`, from the flags to the exit code."""

    def __init__(
        self, http: HttpArgs, args: ServerArgs, keys: tuple[tuple[str, str], ...], listening: socket.socket
    ) -> None:
        self._http, self._args, self._keys, self._listening = http, args, keys, listening

    def run(self, interrupts: Interrupts) -> int:
        root = find_root(self._args, say)
        args = with_local_vae(self._args)
        spec = identify(root, args.backend, args.trust_remote_code)
        say(f"backend: {FAMILIES[spec.family].backend} ({spec.reason})")
        check_layout(args, root)
        limits = self._limits(spec)
        server = Supervisor(
            args,
            root,
            frame_bytes(spec, limits.max_pixels),
            lambda ends: self._frontend(args, root, limits, ends, server),
        )
        try:
            interrupts.drain_on_terminate()
            server.start()
            host, port = self._listening.getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            say(f"listening on {address}; the model is being loaded")
            if args.state_dir is None:
                say("jobs and results are lost when the server stops; --state-dir FOLDER keeps them")
            card = address_card.Card(server.endpoints, str(root), args.backend, args.trust_remote_code, args.vae_path)
            card_file = address_card.write(server.state_folder, card)
            say(f"Python clients: safelight.Client({str(card_file.parent)!r})")
            threading.Thread(target=_announce, args=(server, args.startup_timeout_s, address), daemon=True).start()
            self._watch(server, interrupts)
        finally:
            interrupts.then_call(lambda: kill(server))
            server.stop()
        return 0

    def _watch(self, server: Supervisor, interrupts: Interrupts) -> None:
        """Until a signal, or the server's failure. SIGTERM drains: what was accepted may finish within the grace."""
        while not interrupts.terminations:
            if server.failure:
                raise server.failure
            server.wait(_LOOK_S)
        say(f"draining: what runs may finish within {self._args.drain_grace_s:.0f} s")
        server.drain(self._args.drain_grace_s)
        say("stopped")

    def _limits(self, spec: ModelSpec) -> RequestLimits:
        http = self._http
        return RequestLimits(
            http.max_pixels if http.max_pixels is not None else most_pixels(spec),
            http.max_frames,
            http.max_steps,
            http.max_outputs,
            round(http.max_body_mb * 1e6),
            round(http.max_input_mb * 1e6),
        )

    def _frontend(
        self, args: ServerArgs, root: Path, limits: RequestLimits, ends: Endpoints, server: Supervisor
    ) -> FrontendSpec:
        dit, vae = precisions(args, resolve_device(args.device, args.num_gpus))
        name = args.model_path or "builtin"
        model = ServedModel(
            name, str(root), args.num_gpus, dit, vae, args.backend, args.trust_remote_code, args.vae_path
        )
        return FrontendSpec(
            ends, self._listening.fileno(), model, limits, self._keys, args.log_level,
            str(server.state_folder / INPUTS), self._http.allow_url_inputs,
        )  # fmt: skip


def say(text: str) -> None:
    print(f"safelight: {text}", file=sys.stderr, flush=True)


def _announce(server: Supervisor, timeout_s: float, address: str) -> None:
    """Says how the start goes. A server that is not ready in time has failed."""
    try:
        server.wait_ready(timeout_s, lambda phase: say(f"workers: {phase}"))
    except StartupError as error:
        server.fail(error)
    else:
        say(f"ready: {address}/v1")


def kill(server: Supervisor) -> None:
    """A second signal: the processes end at once, and `stop` only has to clean up."""
    for pid in server.pids().values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
