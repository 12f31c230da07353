"""The registry of model families that frontend and scheduler read. One line per family."""

from __future__ import annotations

import json
from pathlib import Path

from safelight.configs.families.base import Family, ModelSpec, Variant
from safelight.configs.families.wan import FAMILY as WAN
from safelight.runtime.errors import ModelError

FAMILIES: dict[str, Family] = {family.name: family for family in (WAN,)}

__all__ = ["FAMILIES", "Family", "ModelSpec", "Variant", "identify"]


def identify(root: Path) -> ModelSpec:
    """Reads `model_index.json` in a diffusers-format directory and says which family runs it.

    Raises ModelError: no such directory, no or unreadable index, a pipeline class that no native family runs.
    """
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
    name = index.get("_class_name") if isinstance(index, dict) else None
    for family in FAMILIES.values():
        if name in family.pipeline_classes:
            return family.identify(index, root)
    known = ", ".join(sorted(c for f in FAMILIES.values() for c in f.pipeline_classes))
    raise ModelError(
        f"{path} names the pipeline class {name!r}; native families run {known}. "
        "`safelight models` lists the supported models",
        param="model_path",
    )
