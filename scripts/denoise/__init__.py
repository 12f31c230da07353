"""What bench_denoise.py times: a module a family with a `Bench`."""

from __future__ import annotations

import dataclasses
from typing import Any

from safelight.runtime.pipelines.ahead import Ahead
from safelight.runtime.pipelines.protocol import DenoiseState


def make_ahead(pipeline: Any, state: DenoiseState) -> None:
    """Makes anew what the next `pipelines.ahead.ROWS` steps of a state share: a step costs that part of it, too."""
    dataclasses.replace(pipeline, ahead=Ahead()).inputs([(0, state)])
