"""The small parts: thinning, smoothing, gaps, warm-up, ticks, numbers, markup."""

from __future__ import annotations

import random

import pytest

from refine_verl.record.format import format_change, format_duration, format_number
from refine_verl.report.axes import nice_ticks
from refine_verl.report.markup import Markup, el
from refine_verl.report.series import (
    Point,
    column,
    head_and_tail,
    moving_average,
    segments,
    thin,
    warmup_spans,
)


def test_thin_keeps_extremes_ends_gaps_and_order() -> None:
    generator = random.Random(3)
    points: list[Point] = [(step, generator.random()) for step in range(10_000)]
    points[1234] = (1234, 50.0)
    points[7777] = (7777, -50.0)
    points[4000] = (4000, None)
    kept = thin(points, 400)
    assert len(kept) <= 404
    assert {points[0], points[-1], points[1234], points[7777], points[4000]} <= set(kept)
    assert kept == sorted(kept, key=lambda point: point[0])
    for start in range(0, 10_000, 50):  # the envelope is that of all points, bucket by bucket
        bucket = [value for step, value in points[start : start + 50] if value is not None]
        left = [value for step, value in kept if start <= step < start + 50 and value is not None]
        assert (min(left), max(left)) == (min(bucket), max(bucket))


def test_thin_leaves_short_series_alone() -> None:
    points: list[Point] = [(1, 2.0), (2, None), (3, 1.0)]
    assert thin(points, 3) == points
    assert thin([], 3) == []


def test_moving_average_by_hand() -> None:
    points: list[Point] = [(0, 1.0), (1, 2.0), (2, None), (3, 6.0), (4, 8.0)]
    assert moving_average(points, 3) == [(0, 1.5), (1, 1.5), (2, None), (3, 7.0), (4, 7.0)]


def test_segments_break_at_gaps_only() -> None:
    assert segments([(1, 1.0), (5, 2.0), (6, None), (7, None), (8, 3.0)]) == [
        [(1, 1.0), (5, 2.0)],
        [(8, 3.0)],
    ]


def test_column_tells_gaps_from_absence_and_skips_text() -> None:
    records = [{"step": 1, "a": 1.0}, {"step": 2}, {"step": 3, "a": None}, {"step": 4, "a": "text"}]
    assert column(records, "a") == [(1, 1.0), (3, None)]


def test_head_and_tail() -> None:
    assert head_and_tail([(step, float(step)) for step in range(30)]) == (1.0, 28.0, 3)
    assert head_and_tail([(0, 4.0)]) == (4.0, 4.0, 1)
    assert head_and_tail([(0, None)]) is None


@pytest.mark.parametrize(
    ("records", "spans"),
    [
        ([{"refine/active": 0.0}, {"refine/active": 0.0}, {"refine/active": 1.0}], [(0, 1)]),
        ([{"refine/active": 0.0}, {}, {"refine/active": 0.0}, {"refine/active": 1.0}], [(0, 2)]),
        (
            [{"refine/active": 1.0}, {"refine/active": 0.0}, {"refine/active": 1.0}, {"refine/active": 0.0}],
            [(1, 1), (3, 3)],
        ),
        ([{"refine/active": 0.0}, {"refine/active": 0.0}], []),  # a run without REFINE has no warm-up
        ([{"refine/active": 1.0}], []),
        ([{}], []),
    ],
)
def test_warmup_spans(records: list[dict[str, object]], spans: list[tuple[int, int]]) -> None:
    assert warmup_spans([{"step": step, **record} for step, record in enumerate(records)]) == spans


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.61, 3.07), (-0.02, 0.03), (0, 12345), (1e-7, 1e-6), (5, 5.001), (-1e9, 1e9)]
)
def test_nice_ticks_are_few_inside_and_evenly_spaced(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, count=6)
    assert 3 <= len(ticks) <= 8
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    spacings = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
    assert max(spacings) == pytest.approx(min(spacings), rel=1e-3)


def test_step_ticks_are_whole() -> None:
    assert nice_ticks(-0.5, 2.5, count=7, whole=True) == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.14159, "3.142"), (0.08319, "0.08319"), (-2.5, "−2.500"), (0.0, "0"), (-0.0, "0"), (1.0, "1"),
        (1857.3, "1857"), (12345.0, "12.35k"), (2.5e6, "2.500M"),
        (1e-6, "1.00×10⁻⁶"), (-3.2e-5, "−3.20×10⁻⁵"), (None, "–"),
        (float("nan"), "–"), (float("inf"), "–"),
    ],
)  # fmt: skip
def test_format_number(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_format_percent_change_and_duration() -> None:
    assert format_number(0.4414, percent=True) == "44.14%"
    assert format_change(3.0, 2.75) == "−0.250"
    assert format_change(0.4, 0.425, percent=True) == "+2.50 pts"
    assert format_change(1.0, 1.0) == "0"
    assert [format_duration(value).replace("\u00a0", " ") for value in (4.26, 125, 3600, 11_520)] == [
        "4.3 s",
        "2 min 5 s",
        "1 h",
        "3 h 12 min",
    ]


def test_markup_escapes_all_but_markup() -> None:
    assert el("p", "<b>", el("i", "&"), class_='"x"') == '<p class="&quot;x&quot;">&lt;b&gt;<i>&amp;</i></p>'
    assert isinstance(el("p"), Markup)
    assert el("meta", http_equiv="a", content=None) == '<meta http-equiv="a"/>'
