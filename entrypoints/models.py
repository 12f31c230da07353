"""`safelight models`: what is supported, from configs/families."""

from __future__ import annotations

import json
from typing import Any

from safelight.configs.families import FAMILIES


def supported() -> list[dict[str, Any]]:
    """One entry per variant, with the defaults that its authors recommend."""
    return [
        {
            "family": family.name,
            "variant": variant.name,
            "hub_id": variant.hub_id or None,
            "task": variant.task,
            "parameters": variant.parameters,
            "height": variant.defaults.height,
            "width": variant.defaults.width,
            "num_frames": variant.defaults.num_frames,
            "num_inference_steps": variant.defaults.num_inference_steps,
            "guidance_scale": variant.defaults.guidance_scale,
            "true_cfg_scale": variant.defaults.true_cfg_scale,
            "samplers": list(family.samplers),
            "note": variant.note,
        }
        for family in FAMILIES.values()
        for variant in family.variants
    ]


def show(as_json: bool) -> None:
    """Prints a table, or one JSON object."""
    if as_json:
        print(json.dumps({"models": supported()}, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "task", "size", "--model-path", "default", "samplers", box=None, pad_edge=False)
    for entry in supported():
        default = "{width}x{height}, {num_frames} frames, {num_inference_steps} steps".format_map(entry)
        path = entry["hub_id"] or entry["note"]
        table.add_row(entry["variant"], entry["task"], entry["parameters"], path, default, ", ".join(entry["samplers"]))
    Console().print(table)
