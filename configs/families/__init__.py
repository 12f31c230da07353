"""The registry of model families that frontend and scheduler read. One line per family."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelight.configs.families.base import Capabilities, Family, ModelSpec, Variant
from safelight.configs.families.diffusers import FAMILY as ANY_OF_DIFFUSERS
from safelight.configs.families.diffusers import check_class, identify_trusting
from safelight.configs.families.flux import FAMILY as FLUX
from safelight.configs.families.latent_rgb import FILE, factors_of
from safelight.configs.families.qwen import FAMILY as QWEN
from safelight.configs.families.wan import FAMILY as WAN
from safelight.configs.families.zimage import FAMILY as ZIMAGE
from safelight.configs.previews import MAX_PREVIEWS
from safelight.runtime.errors import InvalidRequest, ModelError, UnsupportedModel

FAMILIES: dict[str, Family] = {family.name: family for family in (WAN, FLUX, QWEN, ZIMAGE, ANY_OF_DIFFUSERS)}

__all__ = [
    "FAMILIES",
    "Capabilities",
    "Family",
    "ModelSpec",
    "Variant",
    "check_images",
    "check_previews",
    "foresee",
    "identify",
    "no_previews",
]


def identify(root: Path, backend: str = "auto", trust_remote_code: bool = False) -> ModelSpec:
    """Reads `model_index.json` in a diffusers-format directory and says which family runs it, and why.

    `backend`: "safelight" takes native families only, "diffusers" none of them, "auto" prefers them.
    Raises ModelError: no such directory, no or unreadable index, a pipeline that the backend does not run.
    """
    index = _index(root)
    if backend == "diffusers":
        return _through_diffusers(index, root, trust_remote_code, "as asked")
    name = index.get("_class_name")
    family = _native(name)
    if family is None:
        refusal = UnsupportedModel(_not_native(name), param="model_path")
    else:
        try:
            return dataclasses.replace(family.identify(index, root), reason=f"{name} has a native family")
        except UnsupportedModel as unsupported:
            refusal = unsupported
    if backend == "safelight":
        message = f"{root}: {refusal.message} (--backend diffusers, or auto, runs other pipelines of diffusers)"
        raise UnsupportedModel(message, param=refusal.param) from refusal
    try:
        return _through_diffusers(index, root, trust_remote_code, refusal.message)
    except ModelError as error:
        raise type(error)(
            f"{root}: {refusal.message}; nor does diffusers: {error.message}", param=error.param
        ) from error


def foresee(path: Path, backend: str = "auto", trust_remote_code: bool = False) -> str:
    """Which backend will take a model, and why, from its model_index.json alone.

    Raises ModelError for a pipeline class that none runs. Whether its components are sound shows with `identify`.
    """
    name = _read_index(path).get("_class_name")
    if backend != "diffusers" and _native(name) is not None:
        return f"{name} has a native family"
    if backend == "safelight":
        raise UnsupportedModel(f"{_not_native(name)} (--backend diffusers, or auto, runs others)", param="model_path")
    if isinstance(name, str):
        try:
            check_class(name)
        except ModelError as error:
            raise type(error)(f"{_not_native(name)}; nor does diffusers: {error.message}", param=error.param) from error
    elif not trust_remote_code:
        raise ModelError(
            f"model_index.json names the pipeline {name!r}, which is code of the checkpoint's own; start with "
            "--trust-remote-code if you have read it and trust it",
            param="trust_remote_code",
        )
    return f"{name} runs through diffusers"


def _native(name: object) -> Family | None:
    return next((f for f in FAMILIES.values() if name in f.pipeline_classes), None)


def _not_native(name: object) -> str:
    known = ", ".join(sorted(c for f in FAMILIES.values() for c in f.pipeline_classes))
    return f"no native family runs {name}; they run {known}"


def check_images(spec: ModelSpec, count: int, param: str = "image_path") -> None:
    """Raises InvalidRequest naming `param` unless the model takes that many pictures with a request."""
    least, most = spec.images
    if not least <= count <= most:
        wanted = str(most) if least == most else f"{least} to {most}"
        raise InvalidRequest(
            f"pictures with a request: {wanted} expected by {spec.variant} ({spec.task}), got {count}",
            param=param,
        )


def no_previews(spec: ModelSpec, vae_path: str | None = None) -> str | None:
    """Why a model makes no previews; None if it makes some. `vae_path`: of another VAE than its own.

    Raises ModelError for a file of factors that is none.
    """
    if not FAMILIES[spec.family].capabilities.previews:
        return f"{spec.variant} runs through diffusers, whose pipelines make no previews"
    vae = Path(vae_path) if vae_path else spec.root / "vae"
    if factors_of(vae) is None:
        return f"{vae} is no VAE whose preview factors are known; scripts/fit_preview.py writes its {FILE}"
    return None


def check_previews(spec: ModelSpec, count: int, vae_path: str | None = None) -> None:
    """Raises InvalidRequest when the model cannot make previews, or for too many."""
    if count > MAX_PREVIEWS:
        raise InvalidRequest(f"previews: at most {MAX_PREVIEWS} expected, got {count}", param="previews")
    if count > 0 and (reason := no_previews(spec, vae_path)) is not None:
        raise InvalidRequest(f"previews: {reason}", param="previews")


def _through_diffusers(index: Mapping[str, Any], root: Path, trust_remote_code: bool, reason: str) -> ModelSpec:
    look = identify_trusting if trust_remote_code else ANY_OF_DIFFUSERS.identify
    return dataclasses.replace(look(index, root), reason=reason)


def _index(root: Path) -> dict[str, Any]:
    path = root / "model_index.json"
    if not root.is_dir():
        raise ModelError(f"no model directory at {root}; check --model-path", param="model_path")
    if not path.is_file():
        raise ModelError(f"{root} has no model_index.json{_what_is_in(root)}", param="model_path")
    return _read_index(path)


def _what_is_in(root: Path) -> str:
    """What the directory seems to hold instead of a model in diffusers format."""
    inner = sorted(path.parent.name for path in root.glob("*/model_index.json"))
    if inner:
        return f"; did you mean its folder {inner[0]!r}?"
    found = sorted(path.name for path in root.iterdir())
    said = f"; found {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}" if found else "; it is empty"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = json.loads((root / "config.json").read_text(encoding="utf-8"))
        kind = config.get("_class_name") or (config.get("architectures") or [None])[0]
        said = f"; it holds a single {kind}" if kind else said
    return f"{said}. --model-path takes a whole pipeline in diffusers format"


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}", param="model_path") from error
    if not isinstance(index, dict):
        raise ModelError(f"{path}: a JSON object expected, got {type(index).__name__}", param="model_path")
    return index
