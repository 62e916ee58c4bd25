"""The few figures a reader wants first: what was learnt, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from refine_verl.record.format import format_change, format_duration, format_number
from refine_verl.report.charts import task_keys
from refine_verl.report.markup import Markup
from refine_verl.report.page import tile
from refine_verl.report.series import column, finite, head_and_tail

MOST_TASKS = 3


def headlines(records: Sequence[dict[str, Any]]) -> list[Markup]:
    """The tiles of a run, those that its metrics allow."""
    validated = bool(finite(column(records, "val/ntp_loss")))
    found = (
        _first_to_last(records, "val/ntp_loss", "Validation loss", better=-1),
        _first_to_last(records, "val/ntp_accuracy", "Validation accuracy", better=1, percent=True),
        *_task_scores(records),
        _start_to_end(records, "nsp/reward/mean", "Reward", better=1),
        _start_to_end(records, "actor/ntp_loss", "Training loss", better=-1) if not validated else None,
        _throughput(records),
        _cost(records),
    )
    return [shown for shown in found if shown]


def _task_scores(records: Sequence[dict[str, Any]]) -> list[Markup | None]:
    """The first few tasks. At test time there is one score, of all answers so far, and that without adaptation."""
    scores = [key for key in task_keys(records) if "/before/" not in key and finite(column(records, key))]
    found: list[Markup | None] = []
    for key in scores[:MOST_TASKS]:
        task, _, metric = key.removeprefix("val/").rpartition("/")
        name = ", ".join(filter(None, (task, metric.replace("_", " "))))
        if before := finite(column(records, f"val/{task}/before/{metric}")):
            value = finite(column(records, key))[-1][1]
            found.append(_changed(name, before[-1][1], value, 1, "{} without adaptation", percent=True))
        else:
            found.append(_first_to_last(records, key, name, better=1, percent=True))
    return found


def _first_to_last(
    records: Sequence[dict[str, Any]], key: str, name: str, better: int, *, percent: bool = False
) -> Markup | None:
    points = finite(column(records, key))
    if not points:
        return None
    (step, first), (_, last) = points[0], points[-1]
    if len(points) == 1:
        return tile(name, format_number(last, percent=percent), detail=f"at step {step}, measured once")
    return _changed(name, first, last, better, f"{{}} at step {step}", percent=percent)


def _start_to_end(records: Sequence[dict[str, Any]], key: str, name: str, better: int) -> Markup | None:
    points = finite(column(records, key))
    found = head_and_tail(points)
    if found is None:
        return None
    first, last, count = found
    if len(points) == 1:
        return tile(name, format_number(last), detail="measured once")
    ends = f"means of the first and last {count} steps" if count > 1 else "first and last step"
    return _changed(name, first, last, better, f"{{}}; {ends}")


def _changed(name: str, first: float, last: float, better: int, since: str, *, percent: bool = False) -> Markup:
    """The last value and its change; `since` says, after `{}` for the first value, where that was measured."""
    return tile(
        name,
        format_number(last, percent=percent),
        change=format_change(first, last, percent=percent),
        verdict=None if first == last else "good" if (last - first) * better > 0 else "poor",
        detail="from " + since.format(format_number(first, percent=percent)),
    )


def _throughput(records: Sequence[dict[str, Any]]) -> Markup | None:
    values = [value for _, value in finite(column(records, "perf/tokens_per_second"))]
    if not values:
        return None
    seconds = sum(value for _, value in finite(column(records, "timing_s/step")))
    steps = "1 step" if len(values) == 1 else f"{len(values)} steps"
    detail = f"median; {steps} in {format_duration(seconds)}" if seconds else "median of the steps"
    return tile("Throughput", format_number(median(values)), unit="tokens/s", detail=detail)


def _cost(records: Sequence[dict[str, Any]]) -> Markup | None:
    values = [value for _, value in finite(column(records, "perf/forward_tokens_per_token"))]
    if not values:
        return None
    return tile("Cost", f"{sum(values) / len(values):.2f}", detail="forward tokens per document token")
