#!/usr/bin/env python3
"""Prints how far a family's pipeline is from diffusers' with the same weights, as a markdown table.

    scripts/parity_table.py [FAMILY] [--model-path DIR]     # without a directory: a tiny random one, float32 on the CPU

Each row is a whole run: prompt to latents and to frames. The negative controls run ours with one thing wrong, to show
that the tolerance would see it. `tests/unit/test_<family>_pipeline.py` asserts the same cases and controls, which are
in `parity/<family>.py`.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # tests load this file by its path

import parity
from parity.compare import CONTROL_FACTOR, TOLERANCE, errors

FAMILIES = sorted({module.name for module in pkgutil.iter_modules(parity.__path__)} - {"compare"})


def family(name: str) -> Any:
    """The module of a family: CHECKPOINT, Case, CASES, CONTROLS, Parity."""
    return importlib.import_module(f"parity.{name}")


def print_table(cases: Any, both: Any) -> bool:
    """True when every case is within the tolerance and every control far outside it."""
    fine = True
    print("| case | settings | max abs error, latents | frames, levels of 255 |")
    print("|---|---|---|---|")
    for case in cases.CASES:
        latents, levels = errors(both.run_ours(case), both.run_reference(case))
        fine = fine and latents <= TOLERANCE and levels <= 1
        print(f"| {case.name} | {case.settings} | {latents:.1e} | {levels} |")
    print("\n| negative control | max abs error, latents | times the tolerance |\n|---|---|---|")
    theirs = both.run_reference(cases.CASES[0])
    for control in cases.CONTROLS:
        latents, _ = errors(both.run_ours(control.case or cases.CASES[0], control.spoil(both.ours)), theirs)
        fine = fine and latents > CONTROL_FACTOR * TOLERANCE
        print(f"| {control.name} | {latents:.1e} | {latents / TOLERANCE:.0f} |")
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the parity table of a family's pipeline.")
    parser.add_argument("family", nargs="?", default="wan", choices=FAMILIES)
    parser.add_argument("--model-path", type=Path, help="a checkpoint of the family (default: a tiny one, made now)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = family(args.family)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model_path
        if folder is None:
            folder = Path(scratch)
            importlib.import_module("make_checkpoint").make(cases.CHECKPOINT, folder)
        fine = print_table(cases, cases.Parity(folder))
    verdict = "held" if fine else "NOT held"
    print(f"\nTolerance {TOLERANCE:.0e}; controls must exceed {CONTROL_FACTOR} times that: {verdict}.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
