#!/usr/bin/env python3
"""Writes docs/models.md from the registry of families and the tests that there are: `scripts/write_models_page.py`.

`tests/unit/test_models_page.py` fails when the page is not what this would write.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from safelight.configs.families import FAMILIES, Family
from safelight.entrypoints.models import row, supported

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
HEAD = """# Models

<!-- Written by scripts/write_models_page.py; change the registry (configs/families) and run it again. -->

`safelight models` prints these tables, `safelight models --json` the same for machines. A `sides` rule holds for height
and width; any other value is an error that names the nearest right ones. `several GPUs` says how they may share one
job; any number of copies (`--replicas`) is possible too. Other pipelines of diffusers run through
[the diffusers backend](diffusers-backend.md).
"""
PLACES = (
    ("against diffusers, float32 on the CPU", "tests/unit/test_{family}*_pipeline.py"),
    ("requests, configs and costs", "tests/unit/test_{family}*_config.py"),
    ("2 to 4 ranks against one", "tests/distributed/test_{family}*_ranks.py"),
    ("on a GPU", "tests/gpu/test_{family}*_gpu.py"),
)


def page() -> str:
    """The whole page."""
    sections = [HEAD]
    for name, entries in groupby(supported(), key=lambda entry: str(entry["family"])):
        found = [row(entry) for entry in entries]
        titles = list(found[0])
        lines = [titles, ["---"] * len(titles), *(list(each.values()) for each in found)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        sections.append(
            f"## {name}\n\nClasses in model_index.json: {classes(FAMILIES[name])}\n\n{table}\n\n{tested(name)}"
        )
    return "\n".join(sections)


def classes(family: Family) -> str:
    return ", ".join(f"`{name}`" for name in family.pipeline_classes)


def tested(family: str) -> str:
    """What is tested where."""
    lines = []
    for what, pattern in PLACES:
        files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern.format(family=family)))
        lines.append(f"- {what}: {', '.join(f'`{file}`' for file in files) or 'not tested'}")
    return "Tested:\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
