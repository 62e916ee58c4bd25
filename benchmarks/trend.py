"""Does a series rise? A straight line's slope with an interval that neighbouring values' likeness does not narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

FLAT, GROWS, FALLS, NOT_UP, UNDECIDED = "flat", "grows", "falls", "does not grow", "undecided"
LEAST = 8
"""Fewer values than that say nothing of a slope."""


@dataclass(frozen=True)
class Trend:
    """A line through a series of one value per step.

    Attributes:
        level: median of the values.
        slope: change per step, least squares.
        low, high: 95% interval of the slope.
        allowed: the change per step that counts as none.
        values: how many there were.
    """

    level: float
    slope: float
    low: float
    high: float
    allowed: float
    values: int

    @property
    def verdict(self) -> str:
        """Claims are for the whole interval; `undecided` if it reaches from none to growth."""
        if self.low > self.allowed:
            return GROWS
        if self.high > self.allowed:
            return UNDECIDED
        if self.high < -self.allowed:
            return FALLS
        return FLAT if self.low >= -self.allowed else NOT_UP

    def to_json(self) -> dict[str, float | int | str]:
        """All of it, with the verdict."""
        return {**asdict(self), "verdict": self.verdict}


def find_trend(
    steps: Sequence[float], values: Sequence[float], *, allowed: float, draws: int = 2000, seed: int = 0
) -> Trend:
    """The trend of a series.

    Memory and step times are alike from one step to the next, so the usual formula would give too narrow an interval.
    Whole blocks of neighbouring residuals are drawn instead (circular block bootstrap, blocks of about n^(1/2)).

    Args:
        steps, values: the series, in order.
        allowed: the change per step, in the unit of ``values``, that counts as none.
        draws, seed: of the bootstrap.

    Raises:
        ValueError: fewer than `LEAST` values, or unequal lengths.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(x) != len(y) or len(x) < LEAST:
        raise ValueError(f"a trend needs at least {LEAST} values at as many steps, got {len(y)} at {len(x)}")
    slope, line = _fit(x, y[None])
    resampled = line + _blocks((y - line)[0], draws, np.random.default_rng(seed))
    slopes, _ = _fit(x, resampled)
    low, high = np.quantile(slopes, [0.025, 0.975])
    return Trend(float(np.median(y)), float(slope[0]), float(low), float(high), float(allowed), len(y))


def _fit(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least squares of each row of ``y`` [m, n] on ``x`` [n]: slopes [m] and lines [m, n]."""
    centred = x - x.mean()
    slopes = (y @ centred) / (centred @ centred)
    return slopes, y.mean(axis=1, keepdims=True) + slopes[:, None] * centred


def _blocks(residuals: NDArray[np.float64], draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """``draws`` series [draws, n] of blocks of neighbouring residuals."""
    n = len(residuals)
    length = max(2, round(n**0.5))
    starts = rng.integers(0, n, size=(draws, -(-n // length)))
    places = (starts[..., None] + np.arange(length)) % n
    return residuals[places.reshape(draws, -1)[:, :n]]
