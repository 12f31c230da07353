"""`safelight doctor`: what this machine has, what is missing, and what that would enable."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import safelight
from safelight.runtime import hub
from safelight.runtime.errors import ModelError

_TORCH_LIMIT_S = 120.0
_OPTIONAL = {
    "triton": "fused kernels on NVIDIA GPUs (pip install 'safelight[cuda]')",
    "flash-attn": "faster attention on CUDA (pip install 'safelight[flash]'; builds for an hour)",
    "yunchang": "tuned sequence parallelism with flash-attn (pip install 'safelight[flash]')",
    "cache-dit": "step caching (pip install 'safelight[cache]')",
}
_ASK_TORCH = """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
found = [f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for d in devices]
print(json.dumps({"cuda": torch.version.cuda, "devices": found}))
"""
_ASK_CODEC = "import av; av.codec.Codec('libx264', 'w')"


@dataclass(frozen=True, slots=True)
class Finding:
    """`state`: "ok"; "note", when something optional is missing; "bad", when `generate` cannot work."""

    name: str
    state: str
    text: str


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _basics() -> Iterable[Finding]:
    yield Finding("safelight", "ok", safelight.__version__)
    state = "ok" if sys.version_info >= (3, 11) else "bad"
    yield Finding("python", state, f"{platform.python_version()} at {sys.executable}")
    linux = sys.platform == "linux"
    yield Finding("platform", "ok" if linux else "bad", platform.platform() + ("" if linux else "; Linux is needed"))
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
    yield Finding("processors", "ok", f"{cores} usable cores")


def _torch() -> Iterable[Finding]:
    version = _version("torch")
    if version is None:
        yield Finding("torch", "bad", "not installed; pip install torch")
        return
    done = _ask(_ASK_TORCH)
    if isinstance(done, str):
        yield Finding("torch", "bad", f"{version} does not work: {done}")
        return
    yield Finding("torch", "ok", version)
    found = json.loads(done.stdout)
    devices = found["devices"]
    if devices:
        yield Finding("devices", "ok", f"CUDA {found['cuda']}: " + "; ".join(devices))
    else:
        why = "torch is a CPU build" if found["cuda"] is None else "the driver shows none"
        yield Finding("devices", "note", f"no CUDA device ({why}); models run on the CPU")


def _ask(program: str) -> subprocess.CompletedProcess[str] | str:
    """Runs a program in another Python, which may be slow, hang or crash; a string says what went wrong."""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=_TORCH_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {_TORCH_LIMIT_S:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done


def _packages() -> Iterable[Finding]:
    for package in ("diffusers", "transformers", "safetensors", "av", "pillow"):
        version = _version(package)
        yield Finding(package, "ok" if version else "bad", version or f"not installed; pip install {package}")
    codec = _ask(_ASK_CODEC)
    broken = isinstance(codec, str)
    yield Finding("H.264", "note" if broken else "ok", f"no MP4 output: {codec}" if broken else "libx264 (GPL) of PyAV")
    for package, enables in _OPTIONAL.items():
        version = _version(package)
        yield Finding(package, "ok" if version else "note", version or f"not installed; would enable {enables}")


def _storage() -> Iterable[Finding]:
    places = (
        ("shared memory", Path("/dev/shm"), 64 << 20, "frame slots of long videos need more; raise --shm-size"),
        ("temporary folder", Path(tempfile.gettempdir()), 256 << 20, "set TMPDIR to a larger disk"),
        ("model cache", _cache(), 0, ""),
    )
    for name, path, least, hint in places:
        existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
        free = shutil.disk_usage(existing).free
        short = free < least
        text = f"{free / 2**30:.1f} GiB free at {path}" + (f"; {hint}" if short else "")
        yield Finding(name, "note" if short else "ok", text)


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _model() -> Iterable[Finding]:
    try:
        yield Finding("built-in model", "ok", str(hub.builtin_model()))
    except ModelError as error:
        yield Finding("built-in model", "note", error.message)


_CHECKS: tuple[Callable[[], Iterable[Finding]], ...] = (_basics, _torch, _packages, _storage, _model)


def examine(as_json: bool) -> int:
    """Prints every finding; the exit code is 1 when something that `generate` needs is missing."""
    findings = [finding for check in _CHECKS for finding in check()]
    bad = any(finding.state == "bad" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not bad, "findings": [asdict(finding) for finding in findings]}, ensure_ascii=False))
        return int(bad)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.state:>4}  {finding.name:<{width}}  {finding.text}")
    return int(bad)
