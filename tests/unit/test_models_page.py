"""docs/models.md and `safelight models` say what the registry says."""

from __future__ import annotations

from pathlib import Path

from rank_processes import module

from safelight.configs.families import FAMILIES
from safelight.entrypoints import models
from safelight.entrypoints.models import Range, frames_of, side_of
from safelight.entrypoints.plan import find_model

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_page_is_what_the_registry_says() -> None:
    program = module(SCRIPTS / "write_models_page.py")
    assert program.PAGE.read_text(encoding="utf-8") == program.page(), "run scripts/write_models_page.py"


def test_every_native_family_names_its_parity_test() -> None:
    program = module(SCRIPTS / "write_models_page.py")
    for family in FAMILIES.values():
        if family.pipeline_classes:
            assert f"`tests/unit/test_{family.name}" in program.tested(family.name)


def test_rules_are_found_by_asking_the_family() -> None:
    wan, spec = FAMILIES["wan"], find_model("Wan2.1-T2V-1.3B")
    assert side_of(wan, spec) == Range(16, 0, 16384)
    assert frames_of(wan, spec) == Range(4, 1, 4093)
    assert str(frames_of(wan, spec)) == "4n + 1 up to 4093"
    assert str(frames_of(FAMILIES["zimage"], find_model("Z-Image"))) == "1"


def test_height_and_width_follow_one_rule() -> None:
    for entry in models.supported():
        if entry["sizes"] is None:
            continue
        family, spec = FAMILIES[entry["family"]], find_model(entry["variant"])
        rule = Range(**entry["sizes"])
        for name in ("height", "width"):
            for value in (rule.step + rule.offset, entry[name], rule.most):
                assert models._accepts(family, spec, **{name: value})
            for value in (entry[name] + 1, rule.most + rule.step):
                assert not models._accepts(family, spec, **{name: value})
