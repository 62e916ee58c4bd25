"""The curve of entropy along the text, with chunk borders and chosen positions (the paper's Fig. E.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from refine_verl.inspect.analysis import Inspection
from refine_verl.inspect.view import finite
from refine_verl.record.format import format_number
from refine_verl.report.axes import BOTTOM, TOP, Frame, number, padded
from refine_verl.report.markup import Markup, el
from refine_verl.report.series import Point, buckets, moving_average

WIDTH, HEIGHT = 1090, 250
MAX_POINTS = 900
AVERAGES = 150  # the bold curve of a long text averages over its length divided by this
MAX_COLUMNS = 160
MAX_NUMBERED = 40  # more numbers would lie on one another


def render_curve(inspection: Inspection) -> Markup:
    """An `<svg>`: raw entropy faint, smoothed entropy above it; pins are links to the rollouts."""
    count = len(inspection.tokens)
    top = max(finite(inspection.entropy), default=0.0)
    frame = Frame(
        x_range=padded(0, count - 1, share=0.004, minimum=0.5),
        y_range=(0.0, top * 1.05 or 1.0),
        width=WIDTH,
        height=HEIGHT,
    )
    borders = [number(frame.x(start - 0.5)) for start, _ in inspection.chunks[1:]]
    return el(
        "svg",
        el("title", "Entropy in nats by token, with chunk borders and chosen positions"),
        frame.grid(x_label="token", y_ticks=5),
        *(el("path", class_="border", d=f"M{x} {TOP}V{HEIGHT - BOTTOM}") for x in borders),
        *_curves(inspection, frame),
        *_columns(inspection, frame),
        el("g", *_pins(inspection, frame), class_="pins"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="group",
        aria_label="Entropy by token",
    )


def averaged_tokens(count: int) -> int:
    """Tokens that the bold curve averages over; 0 where a text is short enough to see every token."""
    return 2 * (count // (2 * AVERAGES)) + 1 if count > MAX_POINTS else 0


def _curves(inspection: Inspection, frame: Frame) -> list[Markup | None]:
    """Entropy faint and smoothed bold; of a long text smoothed faint and an average of many tokens bold."""
    faint, bold = _points(inspection.entropy), _points(inspection.smoothed)
    if window := averaged_tokens(len(inspection.tokens)):
        faint, bold = bold, moving_average(bold, window)
    return [frame.curve(faint, "line raw c2", MAX_POINTS), frame.curve(bold, "line c2", MAX_POINTS)]


def _points(values: Sequence[float]) -> list[Point]:
    return [(index, value if math.isfinite(value) else None) for index, value in enumerate(values)]


def _columns(inspection: Inspection, frame: Frame) -> list[Markup]:
    """Invisible columns that show the numbers of their tokens."""
    drawn = []
    for first, stop in buckets(len(inspection.tokens), MAX_COLUMNS):
        if values := finite(inspection.smoothed[first:stop]):
            name = f"token {first}" if stop - first == 1 else f"tokens {first}–{stop - 1}"
            text = f"{name}\nsmoothed entropy: {format_number(sum(values) / len(values))}"
            drawn.append(frame.hover(text, first - 0.5, stop - 0.5))
    return drawn


def _pins(inspection: Inspection, frame: Frame) -> list[Markup]:
    """A stem at each chosen position, its number above and a dot at its height: a link to what was written there."""
    numbered = len(inspection.positions) <= MAX_NUMBERED
    pins = []
    for order, position in enumerate(inspection.positions, start=1):
        x = number(frame.x(position.index))
        value = inspection.smoothed[position.index]
        y = number(frame.y(value if math.isfinite(value) else 0.0))
        label = el("text", order, x=x, y=TOP - 6, text_anchor="middle") if numbered else None
        pins.append(
            el(
                "a",
                el("title", f"position {order}: after token {position.index}"),
                el("path", class_="stem", d=f"M{x} {TOP}V{y}"),
                el("circle", class_="pin", cx=x, cy=y, r="4"),
                label,
                href=f"#p{order}",
                aria_label=f"Position {order}, after token {position.index}",
            )
        )
    return pins
