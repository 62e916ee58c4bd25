"""From metrics records to what a chart draws: series, gaps, smoothing, thinning, warm-up spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

Point = tuple[float, "float | None"]
Record = Mapping[str, Any]


def column(records: Sequence[Record], key: str) -> list[Point]:
    """(step, value) wherever `key` was measured; the value is None where it was not finite."""
    points: list[Point] = []
    for record in records:
        value = record.get(key, "")
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            points.append((record["step"], None if value is None else float(value)))
    return points


def finite(points: Sequence[Point]) -> list[tuple[float, float]]:
    """The points that have a value."""
    return [(step, value) for step, value in points if value is not None]


def segments(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Runs of points without a non-finite value between them: a line is broken there, not drawn across."""
    return [finite(list(run)) for drawn, run in groupby(points, key=lambda point: point[1] is not None) if drawn]


def buckets(count: int, most: int) -> list[tuple[int, int]]:
    """The half-open ranges of at most `most` buckets of neighbours, of nearly equal sizes, none of them empty."""
    number = min(count, most)
    return [(index * count // number, (index + 1) * count // number) for index in range(number)]


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most about `limit` points that look the same: of each bucket of neighbours the lowest and highest.

    The first and the last point, every extreme, and one gap per bucket that has one are kept, in order.
    """
    if len(points) <= limit:
        return list(points)
    kept = {0, len(points) - 1}
    for start, stop in buckets(len(points), max(limit // 2, 1)):
        values = {index: value for index in range(start, stop) if (value := points[index][1]) is not None}
        if values:
            kept |= {min(values, key=values.__getitem__), max(values, key=values.__getitem__)}
        if len(values) < stop - start:
            kept.add(next(index for index in range(start, stop) if index not in values))
    return [points[index] for index in sorted(kept)]


def moving_average(points: Sequence[Point], window: int) -> list[Point]:
    """Centred average over `window` points, only existing and finite neighbours counted; gaps stay gaps."""
    sums, counts = [0.0], [0]
    for _, value in points:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    half = window // 2
    averaged: list[Point] = []
    for index, (step, value) in enumerate(points):
        low, high = max(index - half, 0), min(index + half + 1, len(points))
        mean = (sums[high] - sums[low]) / max(counts[high] - counts[low], 1)
        averaged.append((step, None if value is None else mean))
    return averaged


def head_and_tail(points: Sequence[Point]) -> tuple[float, float, int] | None:
    """Mean of the first and of the last tenth, and how many points each has; for noisy metrics."""
    values = [value for _, value in finite(points)]
    if not values:
        return None
    count = max(len(values) // 10, 1)
    return sum(values[:count]) / count, sum(values[-count:]) / count, count


def final_value(points: Sequence[Point], *, tail: bool) -> float | None:
    """The mean of the last tenth (`tail`) or the last value, of those that are finite."""
    values = finite(points)
    found = head_and_tail(values)
    return None if found is None else found[1] if tail else values[-1][1]


def warmup_spans(records: Sequence[Record]) -> list[tuple[float, float]]:
    """Spans (first, last step) in which a run that also refines was warming up.

    A step says so by `refine/active: 0`. A run that never refines has no warm-up.
    """
    states = [(record["step"], active) for record in records if (active := record.get("refine/active")) is not None]
    if not any(active for _, active in states):
        return []
    runs = [list(run) for active, run in groupby(states, key=lambda state: bool(state[1])) if not active]
    return [(run[0][0], run[-1][0]) for run in runs]
