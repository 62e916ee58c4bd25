"""Cells of tables that the miniature and the command on files share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.miniature.statistics import Estimate
from refine_verl.record.format import size_text

COSTS = (
    "kept for each document",
    "to make: seconds",
    "to make: token passes",
    "ms per question",
    "passes per question",
)


def costs(record: Mapping[str, Any] | None) -> list[str]:
    """Cells of what an arm costs; their headings for None."""
    if record is None:
        return list(COSTS)
    return [
        size_text(round(record["kept_bytes"])) if record["kept_bytes"] else "nothing",
        seconds(record["making_seconds"]),
        f"{record['making_passes']:,.0f}",
        seconds(1000 * record["seconds_per_question"]),
        f"{record['passes_per_question']:,.0f}",
    ]


def seconds(value: float) -> str:
    """Two significant digits."""
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def figure(one: Estimate, *, signed: bool = False, digits: int = 3) -> str:
    """A mean with its interval, a difference in bold where its interval leaves zero out."""
    text = one.text(digits, signed=signed).replace("-", "\u2212")
    return f"**{text}**" if signed and one.sign else text
