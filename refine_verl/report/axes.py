"""Axes of a chart: the scale from data to the view box, round ticks, labels and grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from refine_verl.record.format import POWERS, power_of_ten
from refine_verl.report.markup import Markup, el, join
from refine_verl.report.series import Point, segments, thin

WIDTH, HEIGHT = 540, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 20, 40
WIDEST = 6  # characters of a label that fit left of the axis


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The plotting area: ranges of the data and their place in a view box of `width` times `height`."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT

    def x(self, step: float) -> float:
        """Horizontal place of a step, or of what else the axis counts."""
        low, high = self.x_range
        return LEFT + (step - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical place of a value; downwards, as SVG counts."""
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def span(self, first: float, last: float) -> tuple[float, float]:
        """Left and right of a range of steps, within the plotting area."""
        return max(self.x(first), LEFT), min(self.x(last), self.width - RIGHT)

    def box(self, first: float, last: float) -> dict[str, object]:
        """Attributes of a rectangle over the whole height, from one step to another."""
        left, right = self.span(first, last)
        height = self.height - TOP - BOTTOM
        return {"x": number(left), "y": TOP, "width": number(right - left), "height": height}

    def hover(self, text: str, first: float, last: float) -> Markup:
        """An invisible column over the plot: the browser shows its text, the style sheet a guide."""
        return el("rect", el("title", text), class_="hit", **self.box(first, last))

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """The coordinates of a line through points, without the letter that begins it."""
        return "L".join(f"{number(self.x(step))} {number(self.y(value))}" for step, value in points)

    def curve(self, points: Sequence[Point], style: str, limit: int) -> Markup | None:
        """A line through about `limit` of the points, broken where there is no value; None where nothing is left."""
        shape = "".join(f"M{self.path(run)}" for run in segments(thin(points, limit)) if len(run) > 1)
        return el("path", class_=style, d=shape) if shape else None

    def grid(self, *, percent: bool = False, x_label: str = "step", whole: bool = True, y_ticks: int = 6) -> Markup:
        """Horizontal grid lines and the labels of both axes."""
        parts: list[Markup] = []
        ticks = nice_ticks(*self.y_range, count=y_ticks)
        labels, power = _labels(ticks, percent=percent)
        if power:
            parts.append(el("text", power, class_="tick", x=LEFT - 8, y=TOP - 7, text_anchor="end"))
        for value, label in zip(ticks, labels, strict=True):
            y = number(self.y(value))
            parts.append(el("path", class_="grid", d=f"M{LEFT} {y}H{self.width - RIGHT}"))
            parts.append(el("text", label, class_="tick", x=LEFT - 8, y=y, dy="0.32em", text_anchor="end"))
        steps = [tick for tick in nice_ticks(*self.x_range, count=7, whole=whole) if tick >= 0]
        for step, label in zip(steps, _labels(steps, percent=False)[0], strict=True):
            x = number(self.x(step))
            parts.append(el("path", class_="axis", d=f"M{x} {self.height - BOTTOM}v4"))
            parts.append(el("text", label, class_="tick", x=x, y=self.height - BOTTOM + 17, text_anchor="middle"))
        parts.append(el("path", class_="axis", d=f"M{LEFT} {self.height - BOTTOM}H{self.width - RIGHT}"))
        middle = (LEFT + self.width - RIGHT) / 2
        parts.append(el("text", x_label, class_="label", x=middle, y=self.height - 5, text_anchor="middle"))
        return join(*parts)


def nice_ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        spacing = max(math.ceil(spacing), 1)
    first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    return [index * spacing for index in range(first, last + 1)]


def padded(low: float, high: float, *, share: float, minimum: float) -> tuple[float, float]:
    """The range with a margin on both sides, never empty."""
    margin = max((high - low) * share, minimum)
    return low - margin, high + margin


def number(value: float) -> str:
    """A coordinate with one decimal, which is finer than the screen."""
    return f"{value:.1f}".removesuffix(".0")


def _labels(ticks: Sequence[float], *, percent: bool) -> tuple[list[str], str]:
    """Labels with the decimals that tell the ticks apart, and the power of ten that tiny ones share."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if percent:
        return [text + "%" for text in _fixed([100 * tick for tick in ticks])], ""
    if 0 < largest < 1e-3 or (largest < 1e-2 and max(map(len, _fixed(ticks)), default=0) > WIDEST):
        exponent = math.floor(math.log10(largest))
        return _fixed([tick * 10.0**-exponent for tick in ticks]), f"×{power_of_ten(exponent)}"
    for power, suffix in POWERS:
        if largest >= max(power, 1e4):
            texts = _fixed([tick / power for tick in ticks])
            return ["0" if tick == 0 else text + suffix for tick, text in zip(ticks, texts, strict=True)], ""
    return _fixed(ticks), ""


def _fixed(values: Sequence[float]) -> list[str]:
    spacing = abs(values[1] - values[0]) if len(values) > 1 else 1.0
    decimals = next((n for n in range(12) if abs(round(spacing, n) - spacing) < 1e-6 * spacing), 12)
    return [f"{value + 0.0:.{decimals}f}".replace("-", "\u2212") for value in values]
