"""The table of what fits in docs/performance.md is what the plan says."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.memory_table")


def test_the_table_has_todays_numbers(module: ModuleType) -> None:
    """One row is worked out again, since all take minutes."""
    page = (ROOT / "docs/performance.md").read_text()
    rows = page.split(module.BEGIN)[1].split(module.END)[0].splitlines()[2:]
    wanted = [
        f"| {name} | {length:,} | `{way}` |"
        for name in module.MODELS.values()
        for length in module.LENGTHS
        for way in module.WAYS
    ]
    there = ["|".join(row.split("|")[:4]) + "|" for row in rows]
    assert there == wanted
    assert module.line(("deltanet_1b3", 131072, "layer")) in rows


def test_what_fits_is_marked(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([70, 78.4, 138.7, 200])

    class Estimate:
        def __init__(self, *_: object) -> None:
            self.peak = next(sizes) * 2**30

    monkeypatch.setattr(module, "pass_peaks", lambda *_: {})
    monkeypatch.setattr(module, "estimate_memory", Estimate)
    assert list(module.cells(("lact_760m", 65536, "layer, reading=segments"))) == ["70", "78*", "139*", "(200)"]
