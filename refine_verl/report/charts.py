"""Which charts a report shows, from which metrics, in which order. A chart without data is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from refine_verl.report.series import Point, column, finite, warmup_spans
from refine_verl.report.svg import Band, Chart, Line

__all__ = [
    "ANSWERS",
    "COST",
    "LEARNING",
    "POLICY",
    "SECTIONS",
    "SPECS",
    "STABILITY",
    "ChartSpec",
    "build_charts",
    "task_keys",
]

LEARNING, ANSWERS, POLICY, STABILITY, COST = "Learning", "Answers", "Policy", "Stability", "Cost"
SECTIONS = (LEARNING, ANSWERS, POLICY, STABILITY, COST)
"""In the order of the page."""
VALIDATION_KEYS = ("val/ntp_loss", "val/ntp_accuracy")
MAX_COLORS = 6


@dataclass(frozen=True, kw_only=True)
class ChartSpec:
    """A chart by the names of its metrics: (metric, label) pairs."""

    section: str
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    noisy: bool = False
    percent: bool = False
    from_zero: bool = False
    unless_zero: bool = False  # left out where every value is 0
    first_color: int = 1


SPECS = (
    ChartSpec(
        section=LEARNING,
        title="Reward by kind",
        unit="mean over rollouts",
        lines=(("nsp/reward_cosine/mean", "cosine"), ("nsp/reward_binary/mean", "binary")),
        noisy=True,
        first_color=3,
    ),
    ChartSpec(
        section=LEARNING,
        title="Next-token loss",
        unit="nats per token",
        lines=(("actor/ntp_loss", "training"), ("val/ntp_loss", "validation")),
        noisy=True,
    ),
    ChartSpec(
        section=LEARNING,
        title="Next-token accuracy",
        unit="share of validation tokens",
        lines=(("val/ntp_accuracy", "validation"),),
        percent=True,
        first_color=2,
    ),
    ChartSpec(
        section=LEARNING,
        title="Loss around test-time training",
        unit="nats per token of the batch's prompts",
        lines=(("ttt/loss_before", "before"), ("ttt/loss_after", "after")),
        noisy=True,
    ),
    ChartSpec(
        section=ANSWERS,
        title="Score of sampled answers",
        unit="mean over answers",
        lines=(("answer/reward/mean", "mean"),),
        noisy=True,
    ),
    ChartSpec(
        section=ANSWERS,
        title="Loss on answers",
        unit="nats per answer token",
        lines=(("answer/ntp_loss", "training"),),
        noisy=True,
    ),
    ChartSpec(
        section=ANSWERS,
        title="Lost signal of answers",
        unit="share",
        lines=(("answer/pg_clipfrac", "clipped ratios"), ("answer/group_zero_std", "prompts of equal scores")),
        noisy=True,
        percent=True,
        from_zero=True,
    ),
    ChartSpec(
        section=ANSWERS,
        title="Length of answers",
        unit="tokens",
        lines=(("answer/length/mean", "mean"),),
        noisy=True,
        from_zero=True,
    ),
    ChartSpec(
        section=POLICY,
        title="Entropy",
        unit="nats",
        lines=(("nsp/entropy/mean", "all positions"), ("nsp/entropy/selected_mean", "selected")),
        noisy=True,
    ),
    ChartSpec(
        section=POLICY,
        title="Policy loss",
        unit="mean over generated tokens",
        lines=(("actor/pg_loss", "policy loss"),),
        noisy=True,
    ),
    ChartSpec(
        section=POLICY,
        title="KL to the rollout policy",
        unit="nats",
        lines=(("actor/ppo_kl", "KL"),),
        noisy=True,
    ),
    ChartSpec(
        section=POLICY,
        title="Lost signal",
        unit="share",
        lines=(("actor/pg_clipfrac", "clipped ratios"), ("nsp/group_zero_std", "groups of equal rewards")),
        noisy=True,
        percent=True,
        from_zero=True,
    ),
    ChartSpec(
        section=STABILITY,
        title="Gradient norm",
        unit="before clipping",
        lines=(("actor/grad_norm", "gradient norm"), ("answer/grad_norm", "of answers")),
        from_zero=True,
    ),
    ChartSpec(
        section=STABILITY,
        title="Updates left out",
        unit="gradients that were not finite, per step",
        lines=(("actor/skipped_updates", "updates"), ("answer/skipped_updates", "of answers")),
        from_zero=True,
        unless_zero=True,
    ),
    ChartSpec(
        section=STABILITY,
        title="Learning rate",
        unit="per optimiser step",
        lines=(("actor/lr", "learning rate"),),
        from_zero=True,
    ),
    ChartSpec(
        section=COST,
        title="Throughput",
        unit="document tokens per second",
        lines=(("perf/tokens_per_second", "tokens/s"),),
        noisy=True,
        from_zero=True,
    ),
    ChartSpec(
        section=COST,
        title="Forward tokens per token",
        unit="model tokens per document token",
        lines=(("perf/forward_tokens_per_token", "forward tokens"),),
        from_zero=True,
    ),
    ChartSpec(
        section=COST,
        title="Peak memory",
        unit="GB",
        lines=(("perf/max_memory_gb", "peak"),),
        from_zero=True,
    ),
)
TIMES: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("rollout", ("rollout",), 1),
    ("reward", ("reward",), 3),
    ("update", ("update",), 2),
    ("answers", ("answer_before", "answer", "score", "update_answers"), 6),
    ("curve", ("curve",), 4),
)
"""Parts of a step: label, the metrics that are its sum, colour."""
BETWEEN_STEPS = (("validate", 4), ("save_checkpoint", 6))


def build_charts(records: Sequence[dict[str, Any]]) -> dict[str, list[Chart]]:
    """Charts by section, in the order of the page; `records` as `merge_steps` returns them."""
    charts: dict[str, list[Chart]] = {section: [] for section in SECTIONS}
    if reward := _reward(records):
        charts[LEARNING].append(reward)
    for spec in SPECS:
        if chart := _from_spec(spec, records):
            charts[spec.section].append(chart)
    charts[LEARNING] += _tasks(records)
    charts[COST][:0] = [chart for chart in (_times(records), _between_steps(records)) if chart]
    steps, spans = (records[0]["step"], records[-1]["step"]), warmup_spans(records)
    return {
        section: [replace(chart, steps=steps, warmup=spans) for chart in found]
        for section, found in charts.items()
        if found
    }


def _from_spec(spec: ChartSpec, records: Sequence[dict[str, Any]]) -> Chart | None:
    lines = [
        Line(
            label=label,
            points=points,
            color=spec.first_color + index,
            noisy=spec.noisy and not key.startswith("val/"),
        )
        for index, (key, label) in enumerate(spec.lines)
        if (points := column(records, key))
    ]
    if not lines or (spec.unless_zero and not any(value for line in lines for _, value in line.points)):
        return None
    return Chart(
        title=spec.title,
        unit=spec.unit,
        lines=lines,
        percent=spec.percent,
        from_zero=spec.from_zero,
    )


def _reward(records: Sequence[dict[str, Any]]) -> Chart | None:
    """Mean reward within one standard deviation, or within the extremes where that was not measured."""
    mean = column(records, "nsp/reward/mean")
    if not mean:
        return None
    deviations = dict(finite(column(records, "nsp/reward/std")))
    band: Band | None = None
    if deviations:
        band = Band(
            label="± one standard deviation",
            low=[_offset(point, deviations, -1) for point in mean],
            high=[_offset(point, deviations, 1) for point in mean],
            color=1,
        )
    elif (low := column(records, "nsp/reward/min")) and (high := column(records, "nsp/reward/max")):
        band = Band(label="lowest to highest", low=low, high=high, color=1)
    line = Line(label="mean", points=mean, color=1, noisy=True)
    return Chart(title="Reward", unit="per rollout", lines=[line], band=band)


def _offset(point: Point, deviations: dict[float, float], sign: int) -> Point:
    step, value = point
    return step, None if value is None or step not in deviations else value + sign * deviations[step]


def task_keys(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the metrics `val/<task>/<metric>`, in the order in which they first came."""
    keys = dict.fromkeys(key for record in records for key in record if key.startswith("val/"))
    return [key for key in keys if key not in VALIDATION_KEYS]


def _tasks(records: Sequence[dict[str, Any]]) -> list[Chart]:
    """One chart per metric of `val/<task>/<metric>`, one line per task."""
    by_metric: dict[str, list[tuple[str, list[Point]]]] = {}
    for key in task_keys(records):
        task, _, metric = key.removeprefix("val/").rpartition("/")
        if finite(points := column(records, key)):
            by_metric.setdefault(metric, []).append((task or metric, points))
    charts = []
    for metric, tasks in by_metric.items():
        for start in range(0, len(tasks), MAX_COLORS):
            lines = [
                Line(label=task, points=points, color=index + 1)
                for index, (task, points) in enumerate(tasks[start : start + MAX_COLORS])
            ]
            charts.append(Chart(title=f"Validation: {metric}", unit=metric, lines=lines))
    return charts


def _times(records: Sequence[dict[str, Any]]) -> Chart | None:
    """Where the time of a step goes; what no part accounts for is shown as `other`."""
    lines = []
    for label, names, color in TIMES:
        if points := _sum(records, [f"timing_s/{name}" for name in names]):
            lines.append(Line(label=label, points=points, color=color))
    tables = [dict(finite(line.points)) for line in lines]
    rest: list[Point] = [
        (step, max(total - sum(table.get(step, 0.0) for table in tables), 0.0))
        for step, total in finite(column(records, "timing_s/step"))
    ]
    if any(value for _, value in rest):
        lines.append(Line(label="other", points=rest, color=5))
    if not lines:
        return None
    return Chart(title="Time per step", unit="seconds", lines=lines, stacked=True)


def _between_steps(records: Sequence[dict[str, Any]]) -> Chart | None:
    """Validation and checkpoints, which `timing_s/step` does not count."""
    lines = [
        Line(label=name.replace("_", " "), points=points, color=color)
        for name, color in BETWEEN_STEPS
        if finite(points := column(records, f"timing_s/{name}"))
    ]
    if not lines:
        return None
    return Chart(title="Time between steps", unit="seconds, each time", lines=lines, from_zero=True)


def _sum(records: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[Point]:
    """Sum of the finite values of `keys` at every step that has one."""
    total: dict[float, float] = {}
    for key in keys:
        for step, value in finite(column(records, key)):
            total[step] = total.get(step, 0.0) + value
    return sorted(total.items())
