"""Figures of the results page as SVG files: differences with their intervals, and curves with error bars.

Colours and ticks are those of the package's reports; each file carries its own style sheet, for light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from examples.miniature.statistics import Estimate
from refine_verl.report.axes import nice_ticks, number, padded
from refine_verl.report.markup import Markup, el, join

WIDTH = 720
ROW = 24
TOP = 44
FOOT = 46
CHARACTER = 6.7  # of the labels' font, in units of the view box

STYLE = """
:root { --back: #ffffff; --line: #d5d9e0; --grid: #eceef2; --text: #1b2330; --muted: #5c6675;
  --c1: #1f66c1; --c2: #c8500a; --c3: #0f7f63; --c4: #8a4fbf; --c5: #6f7885; --c6: #a3446b; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --line: #3a4454; --grid: #252c38; --text: #e6eaf0;
  --muted: #98a3b3; --c1: #66a8f5; --c2: #f58b4c; --c3: #45c2a0; --c4: #bd93ee; --c5: #98a3b3; --c6: #e384ab; } }
.back { fill: var(--back); }
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--text); }
.title { font-size: 14px; font-weight: 600; }
.tick, .axis-label, .head { fill: var(--muted); font-size: 11.5px; }
.head { font-weight: 600; }
.grid { stroke: var(--grid); } .axis { stroke: var(--line); } .zero { stroke: var(--muted); stroke-dasharray: 4 3; }
.grid, .axis, .zero, .bar { fill: none; }
.bar { stroke: var(--c); stroke-width: 2; } .dot { fill: var(--c); }
.d2 { stroke-dasharray: 7 4; } .d3 { stroke-dasharray: 2 4; } .d4 { stroke-dasharray: 9 3 2 3; }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
"""


@dataclass(frozen=True)
class Row:
    """A line of a forest plot; one without an estimate is a heading. ``color`` is 1 to 6."""

    label: str
    estimate: Estimate | None = None
    color: int = 1


def forest(title: str, unit: str, rows: Sequence[Row]) -> str:
    """Means with their intervals, one under the other, and a line at zero.

    Raises:
        ValueError: no row has an estimate.
    """
    estimates = [row.estimate for row in rows if row.estimate is not None]
    if not estimates:
        raise ValueError(f"{title}: nothing to draw")
    ends = [end for one in estimates for end in (one.low, one.high, one.mean) if math.isfinite(end)]
    low, high = padded(min(*ends, 0.0), max(*ends, 0.0), share=0.06, minimum=1e-6)
    left = 16 + CHARACTER * max(len(row.label) for row in rows if row.estimate is not None)
    height = TOP + ROW * len(rows) + FOOT

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - 20)

    bottom = height - FOOT
    parts = [_vertical(x(tick), bottom, label) for tick, label in _ticks(low, high)]
    parts.append(el("path", class_="zero", d=f"M{number(x(0.0))} {TOP - 6}V{bottom}"))
    for index, row in enumerate(rows):
        parts.append(_row(row, TOP + ROW * index + ROW / 2, x))
    parts.append(
        el("text", unit, class_="axis-label", x=number((left + WIDTH) / 2), y=height - 10, text_anchor="middle")
    )
    return _figure(title, height, parts)


@dataclass(frozen=True)
class Series:
    """A curve: (x, estimate) points in the order of x."""

    label: str
    points: Sequence[tuple[float, Estimate]]
    color: int
    pattern: int = 1


def curves(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """Means over x with error bars and a legend to the right.

    Raises:
        ValueError: no series has a point.
    """
    points = [point for one in series for point in one.points]
    if not points:
        raise ValueError(f"{title}: nothing to draw")
    left, height = 64, 340
    right = WIDTH - 32 - CHARACTER * max(len(one.label) for one in series)
    ends = [end for _, one in points for end in (one.low, one.high, one.mean) if math.isfinite(end)]
    low, high = padded(min(ends), max(ends), share=0.06, minimum=1e-6)
    first, last = padded(min(x for x, _ in points), max(x for x, _ in points), share=0.03, minimum=1e-6)
    bottom = height - FOOT

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - first) / (last - first) * (right - left), bottom - (y - low) / (high - low) * (bottom - TOP)

    parts: list[Markup] = []
    for tick, label in _ticks(low, high):
        y = number(place(first, tick)[1])
        parts.append(el("path", class_="grid", d=f"M{left} {y}H{number(right)}"))
        parts.append(el("text", label, class_="tick", x=left - 8, y=y, dy="0.32em", text_anchor="end"))
    parts += [_vertical(place(tick, low)[0], bottom, label) for tick, label in _ticks(first, last)]
    parts.append(el("text", y_label, class_="axis-label", x=8, y=TOP - 12))
    middle = number((left + right) / 2)
    parts.append(el("text", x_label, class_="axis-label", x=middle, y=height - 10, text_anchor="middle"))
    for index, one in enumerate(series):
        parts += [_curve(one, place), _legend(one, right + 8, TOP + 8 + 20 * index)]
    return _figure(title, height, parts)


def _curve(series: Series, place: object) -> Markup:
    assert callable(place)
    drawn = [(place(x, one.mean), place(x, one.low), place(x, one.high)) for x, one in series.points]
    path = "L".join(f"{number(x)} {number(y)}" for (x, y), _, _ in drawn)
    parts = [el("path", class_=f"bar c{series.color} d{series.pattern}", d=f"M{path}")]
    for (x, y), (_, low), (_, high) in drawn:
        if math.isfinite(low):
            parts.append(el("path", class_=f"bar c{series.color}", d=f"M{number(x)} {number(low)}V{number(high)}"))
        parts.append(el("circle", class_=f"dot c{series.color}", cx=number(x), cy=number(y), r="3.4"))
    return join(*parts)


def _legend(series: Series, x: float, y: float) -> Markup:
    line = el("path", class_=f"bar c{series.color} d{series.pattern}", d=f"M{number(x)} {number(y)}h16")
    return join(line, el("text", series.label, x=number(x + 21), y=number(y), dy="0.34em"))


def _row(row: Row, y: float, x: object) -> Markup:
    assert callable(x)
    if row.estimate is None:
        return el("text", row.label, class_="head", x=8, y=number(y), dy="0.34em")
    one, parts = row.estimate, [el("text", row.label, x=8, y=number(y), dy="0.34em")]
    if math.isfinite(one.half_width):
        ends = "".join(f"M{number(x(end))} {number(y - 4)}v8" for end in (one.low, one.high))
        line = f"M{number(x(one.low))} {number(y)}H{number(x(one.high))}"
        parts.append(el("path", class_=f"bar c{row.color}", d=line + ends))
    parts.append(el("circle", class_=f"dot c{row.color}", cx=number(x(one.mean)), cy=number(y), r="4"))
    parts.append(el("title", f"{row.label}: {one.text(4, signed=True)} ({one.count} seeds)"))
    return el("g", *parts)


def _vertical(x: float, bottom: float, label: str) -> Markup:
    return join(
        el("path", class_="grid", d=f"M{number(x)} {TOP - 6}V{number(bottom)}"),
        el("text", label, class_="tick", x=number(x), y=number(bottom + 17), text_anchor="middle"),
    )


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers and their labels, with as many decimals as tell them apart."""
    ticks = nice_ticks(low, high, count=6)
    spacing = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    if spacing >= 1000:
        return [(tick, f"{tick / 1000:g}k") for tick in ticks]
    decimals = next((n for n in range(12) if abs(round(spacing, n) - spacing) < 1e-6 * spacing), 12)
    return [(tick, f"{tick + 0.0:.{decimals}f}".replace("-", "\u2212")) for tick in ticks]


def _figure(title: str, height: float, parts: Sequence[Markup]) -> str:
    svg = el(
        "svg",
        el("title", title),
        Markup(f"<style>{STYLE}</style>"),
        el("rect", class_="back", width=WIDTH, height=number(height)),
        el("text", title, class_="title", x=8, y=20),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {number(height)}",
        width=WIDTH,
        height=number(height),
        role="img",
    )
    return svg + "\n"
