"""Small inline SVG charts: lines with a band, and stacked bars. No script, no font, no colour of their own.

The view box is fixed and the page scales it. Colours are classes of the style sheet (`c1` ... `c6`), so that
one drawing serves light, dark and paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from refine_verl.record.format import format_number
from refine_verl.report.axes import BOTTOM, HEIGHT, TOP, WIDTH, Frame, number, padded
from refine_verl.report.markup import Markup, el, join
from refine_verl.report.series import Point, buckets, finite, moving_average, segments, thin

MAX_POINTS = 400  # more than the pixels of a line can show
MAX_COLUMNS = 80  # of tooltips and of stacked bars
MARKERS = 6  # markers along a line that has some
MAX_MARKED = 40  # a line of so few points shows where they are
SMOOTH_FROM = 40  # a noisy line of so many points is also drawn as its moving average


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What the horizontal axis counts: its label, the word in tooltips, and whether it counts in whole numbers."""

    label: str = "step"
    one: str = "step"
    many: str = "steps"
    whole: bool = True

    def text(self, value: float) -> str:
        """`7`, `1.23M`."""
        return str(int(value)) if self.whole else format_number(value)


@dataclass(frozen=True)
class Line:
    """A series of a chart; `color` is 1 to 6, `noisy` adds a moving average.

    `pattern` 1 to 6 tells lines apart where there is no colour: 1 is solid, each of the others has a dash and a
    marker of its own. 0 is for lines that their place or their chart tells apart.
    """

    label: str
    points: Sequence[Point]
    color: int
    noisy: bool = False
    pattern: int = 0


@dataclass(frozen=True)
class Band:
    """The area between two series."""

    label: str
    low: Sequence[Point]
    high: Sequence[Point]
    color: int


@dataclass(frozen=True)
class Chart:
    """What is drawn in one frame; `steps` is the range of the run, the same for all its charts.

    `tail` says what the legend's figures are, and makes it say so: means of the last tenth, or last values. Without
    it they are last values, as everywhere on the page of one run.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    band: Band | None = None
    stacked: bool = False
    percent: bool = False
    from_zero: bool = False
    steps: tuple[float, float] = (0, 1)
    axis: Axis = Axis()
    warmup: Sequence[tuple[float, float]] = ()
    tail: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """Neighbouring steps that share a bar or a tooltip, with each line's finite values there."""

    first: float
    last: float
    values: Sequence[Sequence[float]]

    def name(self, axis: Axis) -> str:
        """`step 7` or `steps 1-25`."""
        if self.first == self.last:
            return f"{axis.one} {axis.text(self.first)}"
        return f"{axis.many} {axis.text(self.first)}–{axis.text(self.last)}"


def render_chart(chart: Chart) -> Markup:
    """The chart as an `<svg>` element with title, axes, shaded warm-up, data and tooltips."""
    columns = _columns(chart.lines)
    margin = 0.5 if chart.axis.whole else 1e-9
    frame = Frame(x_range=padded(*chart.steps, share=0.012, minimum=margin), y_range=_y_range(chart, columns))
    if chart.stacked:
        data = _stack(chart, columns, frame)
    else:
        band = _band(chart.band, frame) if chart.band else None
        data = join(band, *(_line(line, frame, chart.axis) for line in chart.lines), _tooltips(chart, columns, frame))
    return el(
        "svg",
        el("title", f"{chart.title} ({chart.unit}) by {chart.axis.label}"),
        *(_shade(first, last, frame) for first, last in chart.warmup),
        frame.grid(percent=chart.percent, x_label=chart.axis.label, whole=chart.axis.whole),
        data,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )


def smoothing_window(line: Line) -> int:
    """Steps a noisy line is averaged over, 0 where it is drawn as it is."""
    count = len(line.points)
    return 2 * (count // 50) + 3 if line.noisy and count >= SMOOTH_FROM else 0


def _y_range(chart: Chart, columns: Sequence[Column]) -> tuple[float, float]:
    if chart.stacked:
        totals = [sum(_mean(values) for values in column.values) for column in columns]
        return 0.0, max(totals, default=0.0) * 1.06 or 1.0
    values: list[float] = [value for line in chart.lines for _, value in finite(line.points)]
    if chart.band:
        values += [value for points in (chart.band.low, chart.band.high) for _, value in finite(points)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if chart.from_zero:
        low = min(low, 0.0)
    size = max(abs(low), abs(high))
    # a constant gets an axis of its own size, a nearly constant one no finer than labels can tell apart
    low, high = padded(low, high, share=0.06, minimum=size * (0.1 if low == high else 5e-4) or 0.5)
    return (max(low, 0.0) if chart.from_zero and min(values) >= 0 else low), high


def _columns(lines: Sequence[Line]) -> list[Column]:
    steps = sorted({step for line in lines for step, _ in line.points})
    tables = [dict(finite(line.points)) for line in lines]
    parts = [steps[start:stop] for start, stop in buckets(len(steps), MAX_COLUMNS)]
    values = [[[table[step] for step in part if step in table] for table in tables] for part in parts]
    return [Column(first=part[0], last=part[-1], values=found) for part, found in zip(parts, values, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _line(line: Line, frame: Frame, axis: Axis) -> Markup:
    points, raw = line.points, None
    if window := smoothing_window(line):
        style = "line raw dense" if len(points) > MAX_POINTS else "line raw"
        raw = frame.curve(points, f"{style} c{line.color}", MAX_POINTS)
        points = moving_average(points, window)
    curve = frame.curve(points, line_style(line), MAX_POINTS)
    return join(raw, curve, _markers(line, points, frame), _dots(line, frame), _gaps(line, frame, axis))


def line_style(line: Line) -> str:
    """Classes of the style sheet for the line's colour and dash."""
    return f"line c{line.color}" + (f" d{line.pattern}" if line.pattern > 1 else "")


def line_marker(line: Line, x: float, y: float) -> Markup:
    """The line's marker at a place of the view box; nothing for lines without one."""
    shapes = {
        2: "m-3.4 -3.4h6.8v6.8h-6.8z",
        3: "m0 -4.4l4.2 7.4h-8.4z",
        4: "m0 -4.6l4.6 4.6l-4.6 4.6l-4.6 -4.6z",
        5: "m0 4.4l4.2 -7.4h-8.4z",
        6: "m-3.8 0a3.8 3.8 0 1 0 7.6 0a3.8 3.8 0 1 0 -7.6 0z",
    }
    if line.pattern not in shapes:
        return Markup()
    return el("path", class_=f"mark c{line.color}", d=f"M{number(x)} {number(y)}{shapes[line.pattern]}")


def _markers(line: Line, points: Sequence[Point], frame: Frame) -> Markup:
    """A few markers along a line; those of different lines start at different places and so do not lie on another."""
    drawn = finite(points)
    if line.pattern < 2 or not drawn:
        return Markup()
    count = min(MARKERS, len(drawn))
    shift = (line.pattern - 1) / 6
    picks = {min(int((index + shift) * len(drawn) / count), len(drawn) - 1) for index in range(count)}
    return join(*(line_marker(line, frame.x(drawn[pick][0]), frame.y(drawn[pick][1])) for pick in sorted(picks)))


def _dots(line: Line, frame: Frame) -> Markup:
    """Dots on the points of a short line, and on points without neighbours, which no line shows."""
    runs = segments(line.points)
    if len(line.points) > MAX_MARKED or line.pattern > 1:
        runs = [run for run in runs if len(run) == 1]
    dots = []
    for step, value in (point for run in runs for point in run):
        place = {"cx": number(frame.x(step)), "cy": number(frame.y(value))}
        dots.append(el("circle", class_=f"dot c{line.color}", r="2.4", **place))
    return join(*dots)


def _gaps(line: Line, frame: Frame, axis: Axis) -> Markup:
    """A small cross above the axis where a value was NaN or infinite."""
    marks = []
    for step, _ in thin([point for point in line.points if point[1] is None], MAX_MARKED):
        shape = f"M{number(frame.x(step) - 3)} {HEIGHT - BOTTOM - 9}l6 6m0 -6l-6 6"
        title = el("title", f"{axis.one} {axis.text(step)}: {line.label} not finite")
        marks.append(el("path", title, class_="bad", d=shape))
    return join(*marks)


def _band(band: Band, frame: Frame) -> Markup:
    """The area between the two series, one shape per stretch without a gap in either."""
    lows, highs = dict(finite(band.low)), dict(finite(band.high))
    steps: list[Point] = [(step, 0.0 if step in lows and step in highs else None) for step, _ in band.low]
    shapes = []
    for run in segments(steps):
        lower = finite(thin([(step, lows[step]) for step, _ in run], MAX_POINTS))
        upper = finite(thin([(step, highs[step]) for step, _ in run], MAX_POINTS))
        if len(run) > 1:
            shapes.append(f"M{frame.path(upper)}L{frame.path(lower[::-1])}Z")
        else:  # as wide as a dot, so that it shows
            x, bottom, top = frame.x(run[0][0]), frame.y(lower[0][1]), frame.y(upper[0][1])
            shapes.append(f"M{number(x - 3)} {number(bottom)}V{number(top)}h6V{number(bottom)}Z")
    return el("path", class_=f"band c{band.color}", d="".join(shapes)) if shapes else Markup()


def _stack(chart: Chart, columns: Sequence[Column], frame: Frame) -> Markup:
    bars = []
    for column, (first, last) in zip(columns, _bounds(columns, chart), strict=True):
        left, right = frame.span(first, last)
        margin = min(0.5, (right - left) * 0.08)
        start, end, base = number(left + margin), number(right - margin), 0.0
        parts: list[Markup] = []
        for line, values in zip(chart.lines, column.values, strict=True):
            if (height := _mean(values)) > 0:
                bottom, top = number(frame.y(base)), number(frame.y(base + height))
                shape = f"M{start} {bottom}V{top}H{end}V{bottom}Z"
                parts.append(el("path", class_=f"fill c{line.color}", d=shape))
                base += height
        bars.append(el("g", el("title", _tooltip(chart, column)), *parts, class_="bar"))
    return join(*bars)


def _tooltips(chart: Chart, columns: Sequence[Column], frame: Frame) -> Markup:
    bounds = zip(columns, _bounds(columns, chart), strict=True)
    return join(*(frame.hover(_tooltip(chart, column), first, last) for column, (first, last) in bounds))


def _bounds(columns: Sequence[Column], chart: Chart) -> list[tuple[float, float]]:
    """First and last step of each column: half-way to its neighbours."""
    middles = [(left.last + right.first) / 2 for left, right in pairwise(columns)]
    half = 0.5 if chart.axis.whole else 0.0
    return list(pairwise([columns[0].first - half, *middles, columns[-1].last + half]))


def _tooltip(chart: Chart, column: Column) -> str:
    rows = [column.name(chart.axis)]
    for line, values in zip(chart.lines, column.values, strict=True):
        if values:
            numbers = (_mean(values), min(values), max(values))
            mean, low, high = (format_number(value, percent=chart.percent) for value in numbers)
            rows.append(f"{line.label}: {mean}" + f" ({low} to {high})" * (len(values) > 1 and not chart.stacked))
    return "\n".join(rows)


def _shade(first: float, last: float, frame: Frame) -> Markup:
    box = frame.box(first - 0.5, last + 0.5)
    return join(el("rect", class_="warmup", **box), el("text", "warm-up", class_="tick", x=box["x"], y=TOP - 7))
