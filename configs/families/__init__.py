"""The registry of model families that frontend and scheduler read. One line per family."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelight.configs.families.base import Capabilities, Family, ModelSpec, Variant
from safelight.configs.families.diffusers import FAMILY as ANY_OF_DIFFUSERS
from safelight.configs.families.diffusers import identify_trusting
from safelight.configs.families.latent_rgb import FILE, factors_of
from safelight.configs.families.wan import FAMILY as WAN
from safelight.configs.previews import MAX_PREVIEWS
from safelight.runtime.errors import InvalidRequest, ModelError, UnsupportedModel

FAMILIES: dict[str, Family] = {family.name: family for family in (WAN, ANY_OF_DIFFUSERS)}

__all__ = [
    "FAMILIES",
    "Capabilities",
    "Family",
    "ModelSpec",
    "Variant",
    "check_images",
    "check_previews",
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
    family = next((f for f in FAMILIES.values() if name in f.pipeline_classes), None)
    if family is None:
        known = ", ".join(sorted(c for f in FAMILIES.values() for c in f.pipeline_classes))
        refusal = UnsupportedModel(f"no native family runs {name}; they run {known}", param="model_path")
    else:
        try:
            return dataclasses.replace(family.identify(index, root), reason=f"{name} has a native family")
        except UnsupportedModel as unsupported:
            refusal = unsupported
    if backend == "safelight":
        message = f"{root}: {refusal.message} (--backend diffusers, or auto, runs other pipelines of diffusers)"
        raise UnsupportedModel(message, param=refusal.param) from refusal
    return _through_diffusers(index, root, trust_remote_code, refusal.message)


def check_images(spec: ModelSpec, count: int) -> None:
    """Raises InvalidRequest unless the model takes that many pictures with a request."""
    least, most = spec.images
    if not least <= count <= most:
        wanted = str(most) if least == most else f"{least} to {most}"
        raise InvalidRequest(
            f"pictures with a request: {wanted} expected by {spec.variant} ({spec.task}), got {count}",
            param="image_path",
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
        raise ModelError(
            f"{root} has no model_index.json; --model-path takes a directory in diffusers format", param="model_path"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}", param="model_path") from error
    if not isinstance(index, dict):
        raise ModelError(f"{path}: a JSON object expected, got {type(index).__name__}", param="model_path")
    return index
