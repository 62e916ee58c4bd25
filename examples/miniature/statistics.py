"""Means over seeds with Student-t intervals, and differences between methods that met the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its two-sided confidence interval (nan for a single value)."""

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of 0, else 0."""
        return (self.low > 0) - (self.high < 0)

    def text(self, digits: int = 3, signed: bool = False) -> str:
        """``0.123 ± 0.045``; ``0.123`` alone where there is only one value."""
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return mean if math.isnan(self.half_width) else f"{mean} ± {self.half_width:.{digits}f}"


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean with its Student-t interval, values taken as independent draws.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to average")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, 1)
    quantile = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)), len(values))


def paired(first: Mapping[str, float], second: Mapping[str, float], confidence: float = 0.95) -> Estimate:
    """Mean of first minus second over the seeds (keys) both have.

    Raises:
        ValueError: no seed in common.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError(f"nothing to pair: seeds {sorted(first)} and {sorted(second)}")
    return estimate([first[key] - second[key] for key in shared], confidence)
