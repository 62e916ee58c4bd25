"""The range of entropies that a text's colours or bars stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from refine_verl.record.format import format_number

__all__ = ["Scale"]

_WITHIN = 0.98  # a few outliers at either end do not make the rest pale
_NOISE = 1e-4  # nats: rounding, as where a model predicts the same everywhere


@dataclass(frozen=True)
class Scale:
    """From the lowest to the highest end, nats; both are NaN where there is nothing to span."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        """The 2nd to 98th percentile of the finite values; all of them where most are the same."""
        ordered = sorted(value for value in values if math.isfinite(value))
        if not ordered:
            return cls(math.nan, math.nan)
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in (1 - _WITHIN, _WITHIN))
        return cls(low, high) if high - low > _NOISE else cls(ordered[0], ordered[-1])

    @property
    def flat(self) -> bool:
        """Whether there is no difference to show."""
        return not self.high - self.low > _NOISE

    def share(self, value: float) -> float:
        """Place on the scale, 0 to 1; 0 on a flat one."""
        return 0.0 if self.flat else min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def text(self, value: float, decimals: int = 1) -> str:
        """Nats with as many decimals as tell a quarter of the scale apart, and at least `decimals`."""
        if not math.isfinite(value):
            return format_number(None)
        needed = 2 if self.flat else -math.floor(math.log10((self.high - self.low) / 4))
        return f"{value:.{max(needed, decimals)}f}"
