"""`safelight models`: what is supported, from configs/families.

Which sizes and frame counts a model takes is found by asking its family's own `validate`, so it cannot be told wrong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safelight.configs.families import FAMILIES, Family, ModelSpec, Variant
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.plan import find_model
from safelight.runtime.errors import InvalidRequest

_STEPS = [2**n for n in range(9)]
_LARGEST = 1 << 17  # pixels of a side, or frames; what is accepted beyond is not looked for
_FRAMES_TRIED = 130


@dataclass(frozen=True, slots=True)
class Range:
    """Values step * n + offset up to `most`. One value: step 0."""

    step: int
    offset: int
    most: int

    def __str__(self) -> str:
        if self.step == 0:
            return str(self.most)
        return f"{self.step}n{f' + {self.offset}' if self.offset else ''} up to {self.most}"


def supported() -> list[dict[str, Any]]:
    """One entry per variant, with the defaults that its authors recommend and what its family takes.

    `sizes` (of both sides), `frames`, `images` (least and most) and `ranks` are None for a variant whose component
    configs are unknown here; `sizes` also where they are the given picture's.
    """
    return [_entry(family, variant) for family in FAMILIES.values() for variant in family.variants]


def _entry(family: Family, variant: Variant) -> dict[str, Any]:
    defaults = variant.defaults
    spec = find_model(variant.name) if variant.configs or variant.name == "builtin" else None
    entry: dict[str, Any] = {
        "family": family.name,
        "variant": variant.name,
        "hub_id": variant.hub_id or None,
        "task": variant.task,
        "parameters": variant.parameters,
        "height": defaults.height,
        "width": defaults.width,
        "num_frames": defaults.num_frames,
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "true_cfg_scale": defaults.true_cfg_scale,
        "samplers": list(family.samplers),
        "note": variant.note,
        "sizes": None,
        "frames": None,
        "images": None,
        "ranks": None,
    }
    if spec is not None:
        entry |= {
            "sizes": dataclasses.asdict(side_of(family, spec)) if defaults.height else None,
            "frames": dataclasses.asdict(frames_of(family, spec)),
            "images": list(spec.images),
            "ranks": ranks_of(family, spec),
        }
    return entry


def side_of(family: Family, spec: ModelSpec) -> Range:
    """Pixels of a picture's side: the rule of height and width, which is the same."""
    default = spec.defaults.height or 0
    step = next(step for step in _STEPS if _accepts(family, spec, height=default + step))
    return Range(step, default % step, _largest(step, default, lambda side: _accepts(family, spec, height=side)))


def frames_of(family: Family, spec: ModelSpec) -> Range:
    """Numbers of frames."""
    taken = [count for count in range(1, _FRAMES_TRIED) if _accepts(family, spec, num_frames=count)]
    if len(taken) < 2:
        return Range(0, 0, taken[0])
    step = taken[1] - taken[0]
    return Range(step, taken[0] % step, _largest(step, taken[-1], lambda n: _accepts(family, spec, num_frames=n)))


def ranks_of(family: Family, spec: ModelSpec) -> list[str]:
    """How several GPUs can share one job: `cfg` where it is guided by default, and how far the sequence is shared."""
    if not family.capabilities.spans_ranks:
        return []
    cfg = ["cfg 2"] if family.guided_by_default(spec) else []
    return [*cfg, f"ulysses up to {family.attention_of(spec).heads}", "ring"]


def _accepts(family: Family, spec: ModelSpec, **changes: int) -> bool:
    params: SamplingParams = dataclasses.replace(spec.defaults, prompt="x", **changes)  # type: ignore[arg-type]
    try:
        family.validate(spec, params)
    except InvalidRequest:
        return False
    return True


def _largest(step: int, known: int, accepts: Callable[[int], bool]) -> int:
    """The largest accepted value of the form known + step * n: values beyond a refused one are refused."""
    few, many = 0, (_LARGEST - known) // step
    while few < many:
        middle = (few + many + 1) // 2
        few, many = (middle, many) if accepts(known + step * middle) else (few, middle - 1)
    return known + step * few


def row(entry: dict[str, Any]) -> dict[str, str]:
    """One of `supported`, for people: columns by title."""
    default = "{width}x{height}".format_map(entry) if entry["height"] else "as the picture"
    default += f", {entry['num_frames']} frames" if entry["num_frames"] > 1 else ""
    guidance = f"{entry['guidance_scale']:g}"
    guidance += f", true {entry['true_cfg_scale']:g}" if entry["true_cfg_scale"] is not None else ""
    least, most = entry["images"] or (0, 0)
    unknown = "as its config says" if entry["frames"] is None else "as the picture"
    return {
        "model": entry["variant"],
        "task": entry["task"],
        "parameters": entry["parameters"],
        "--model-path": entry["hub_id"] or entry["note"],
        "default": default,
        "steps": str(entry["num_inference_steps"]),
        "guidance": guidance,
        "sides": str(Range(**entry["sizes"])) if entry["sizes"] else unknown,
        "frames": str(Range(**entry["frames"])) if entry["frames"] else unknown,
        "pictures in": "none" if most == 0 else str(most) if least == most else f"{least} to {most}",
        "samplers": ", ".join(entry["samplers"]),
        "several GPUs": unknown if entry["ranks"] is None else ", ".join(entry["ranks"]) or "replicas",
    }


def show(as_json: bool) -> None:
    """Prints a table, as wide as it is, or one JSON object."""
    if as_json:
        print(json.dumps({"models": supported()}, ensure_ascii=False))
        return
    found = [row(entry) for entry in supported()]
    lines = [list(found[0]), *(list(each.values()) for each in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print("\nAny other pipeline of diffusers runs through --backend diffusers (docs/diffusers-backend.md).")
