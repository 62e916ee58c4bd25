"""The slope that `benchmarks.load` reports: growth is found, and noise is not taken for growth."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = np.arange(240.0)


@pytest.fixture
def trend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.trend")


def wandering(seed: int, memory: float = 0.9, n: int = len(STEPS)) -> np.ndarray:
    """Noise in which neighbours are alike, of standard deviation 1."""
    rng = np.random.default_rng(seed)
    values = np.zeros(n)
    for i in range(1, n):
        values[i] = memory * values[i - 1] + rng.normal() * (1 - memory**2) ** 0.5
    return values


def test_a_leak_is_found(trend: ModuleType) -> None:
    """0.1 MB per step under 2 MB of wandering noise."""
    found = trend.find_trend(STEPS, 600 + 0.1 * STEPS + 2 * wandering(0), allowed=0.05)
    assert found.verdict == "grows" and found.low < 0.1 < found.high
    assert trend.find_trend(STEPS, 600 - 0.1 * STEPS + 2 * wandering(0), allowed=0.05).verdict == "falls"


def test_no_leak_is_not(trend: ModuleType) -> None:
    found = trend.find_trend(STEPS, 600 + 0.2 * wandering(1), allowed=0.05)
    assert found.verdict == "flat" and found.low < found.slope < found.high and round(found.level) == 600


def test_too_much_noise_to_tell(trend: ModuleType) -> None:
    assert trend.find_trend(STEPS, 600 + 60 * wandering(2), allowed=0.05).verdict == "undecided"


def test_noise_around_a_fall_is_no_growth(trend: ModuleType) -> None:
    """The interval lies below growth, but reaches from a fall to nothing."""
    found = trend.find_trend(STEPS, 600 - 0.05 * STEPS + 3 * wandering(0), allowed=0.05)
    assert found.low < -0.05 < found.high < 0.05 and found.verdict == "does not grow"


def test_the_interval_holds_what_it_says(trend: ModuleType) -> None:
    """With neighbours alike, the textbook interval misses the true slope much more often than once in twenty."""
    hits = textbook = 0
    for seed in range(100):
        values = 0.02 * STEPS + wandering(seed, memory=0.7)
        found = trend.find_trend(STEPS, values, allowed=0, draws=300, seed=seed)
        hits += found.low < 0.02 < found.high
        centred = STEPS - STEPS.mean()
        rest = values - values.mean() - found.slope * centred
        error = 1.97 * (rest @ rest / (len(STEPS) - 2) / (centred @ centred)) ** 0.5
        textbook += abs(found.slope - 0.02) < error
    assert hits >= 82 and textbook < hits - 15


def test_exact_on_a_line(trend: ModuleType) -> None:
    found = trend.find_trend(STEPS[:20], 3 + 0.5 * STEPS[:20], allowed=0.1)
    assert found.slope == pytest.approx(0.5) and found.low == pytest.approx(0.5) and found.verdict == "grows"
    assert found.to_json()["verdict"] == "grows"


def test_too_short(trend: ModuleType) -> None:
    with pytest.raises(ValueError, match="at least 8"):
        trend.find_trend([1.0, 2.0], [1.0, 2.0], allowed=0)
