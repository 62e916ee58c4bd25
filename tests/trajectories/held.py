"""What is recorded here, and how near to it a run has to be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trajectories.compare import differences
from trajectories.process import ROOT

RECORDED = Path(__file__).parent / "recorded"
FIRST_STEPS = 2e-5
"""Relative, up to step 1: nothing but the order of sums."""
LATER_STEPS = 1e-4
"""Relative: Adam divides by the size of a gradient, so that rounding in a small one moves a weight."""


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{name}.json").read_text())


def this_checkout() -> str:
    """PYTHONPATH of commands that import the package from here."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Metrics, answers, names of files and norms of weights; what is said is held by other tests."""
    early = [[step for step in run["steps"] if step["step"] <= 1] for run in (wanted, found)]
    assert not list(differences(*early, FIRST_STEPS))
    parts = [{name: run[name] for name in ("steps", "predictions", "files", "model")} for run in (wanted, found)]
    assert not list(differences(*parts, LATER_STEPS))
