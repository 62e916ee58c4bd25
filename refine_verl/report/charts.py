"""Which charts a report shows, from which metrics, in which order. A chart without data is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from refine_verl.report.series import Point, column, finite, warmup_spans
from refine_verl.report.svg import Band, Chart, Line

LEARNING, ANSWERS, POLICY, STABILITY, COST = "Learning", "Answers", "Policy", "Stability", "Cost"
VALIDATION_KEYS = ("val/ntp_loss", "val/ntp_accuracy")
MAX_COLORS = 6


@dataclass(frozen=True)
class ChartSpec:
    """A chart by the names of its metrics, each with its label; a noisy one is smoothed, validation never is."""

    title: str
    unit: str
    lines: Mapping[str, str]
    noisy: bool = True
    percent: bool = False
    from_zero: bool = False
    unless_zero: bool = False  # left out where every value is 0
    first_color: int = 1

    def chart(self, title: str, lines: Sequence[Line], **more: Any) -> Chart | None:
        """These lines drawn as the spec says; None where there is nothing to see. ``more`` goes to the chart."""
        if not lines or (self.unless_zero and not any(value for line in lines for _, value in line.points)):
            return None
        return Chart(title, self.unit, lines, percent=self.percent, from_zero=self.from_zero, **more)


def is_validation(key: str) -> bool:
    """Whether a metric is measured rarely, and on more text than a step: it needs no averaging."""
    return key.startswith("val/")


SPECS = {
    LEARNING: (
        ChartSpec(
            "Reward by kind",
            "mean over rollouts",
            {"nsp/reward_cosine/mean": "cosine", "nsp/reward_binary/mean": "binary"},
            first_color=3,
        ),
        ChartSpec("Next-token loss", "nats per token", {"actor/ntp_loss": "training", "val/ntp_loss": "validation"}),
        ChartSpec(
            "Next-token accuracy",
            "share of validation tokens",
            {"val/ntp_accuracy": "validation"},
            percent=True,
            first_color=2,
        ),
        ChartSpec(
            "Loss around test-time training",
            "nats per token of the batch's prompts",
            {"ttt/loss_before": "before", "ttt/loss_after": "after"},
        ),
    ),
    ANSWERS: (
        ChartSpec("Score of sampled answers", "mean over answers", {"answer/reward/mean": "mean"}),
        ChartSpec("Loss on answers", "nats per answer token", {"answer/ntp_loss": "training"}),
        ChartSpec(
            "Lost signal of answers",
            "share",
            {"answer/pg_clipfrac": "clipped ratios", "answer/group_zero_std": "prompts of equal scores"},
            percent=True,
            from_zero=True,
        ),
        ChartSpec("Length of answers", "tokens", {"answer/length/mean": "mean"}, from_zero=True),
    ),
    POLICY: (
        ChartSpec("Entropy", "nats", {"nsp/entropy/mean": "all positions", "nsp/entropy/selected_mean": "selected"}),
        ChartSpec("Policy loss", "mean over generated tokens", {"actor/pg_loss": "policy loss"}),
        ChartSpec(
            "Signal in the policy gradient",
            "squared length of its mean over its variance, of a mini-batch",
            {"nsp/gradient_snr": "signal to noise"},
            from_zero=True,
        ),
        ChartSpec(
            "Policy gradient and next-token gradient", "cosine between them", {"nsp/gradient_cosine_ntp": "cosine"}
        ),
        ChartSpec("KL to the rollout policy", "nats", {"actor/ppo_kl": "KL"}),
        ChartSpec(
            "Lost signal",
            "share",
            {"actor/pg_clipfrac": "clipped ratios", "nsp/group_zero_std": "groups of equal rewards"},
            percent=True,
            from_zero=True,
        ),
    ),
    STABILITY: (
        ChartSpec(
            "Gradient norm",
            "before clipping",
            {"actor/grad_norm": "gradient norm", "answer/grad_norm": "of answers"},
            from_zero=True,
            noisy=False,
        ),
        ChartSpec(
            "Updates left out",
            "gradients that were not finite, per step",
            {"actor/skipped_updates": "updates", "answer/skipped_updates": "of answers"},
            from_zero=True,
            unless_zero=True,
            noisy=False,
        ),
        ChartSpec("Learning rate", "per optimiser step", {"actor/lr": "learning rate"}, from_zero=True, noisy=False),
    ),
    COST: (
        ChartSpec("Throughput", "document tokens per second", {"perf/tokens_per_second": "tokens/s"}, from_zero=True),
        ChartSpec(
            "Forward tokens per token",
            "model tokens per document token",
            {"perf/forward_tokens_per_token": "forward tokens"},
            from_zero=True,
            noisy=False,
        ),
        ChartSpec("Peak memory", "GB", {"perf/max_memory_gb": "peak"}, from_zero=True, noisy=False),
    ),
}
"""By section, in the order of the page."""
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
    charts = {section: [_from_spec(spec, records) for spec in specs] for section, specs in SPECS.items()}
    charts[LEARNING] = [_reward(records), *charts[LEARNING], *_tasks(records)]
    charts[COST] = [_times(records), _between_steps(records), *charts[COST]]
    steps, spans = (records[0]["step"], records[-1]["step"]), warmup_spans(records)
    return {
        section: [replace(chart, steps=steps, warmup=spans) for chart in found if chart]
        for section, found in charts.items()
        if any(found)
    }


def _from_spec(spec: ChartSpec, records: Sequence[dict[str, Any]]) -> Chart | None:
    lines = [
        Line(label, points, spec.first_color + index, noisy=spec.noisy and not is_validation(key))
        for index, (key, label) in enumerate(spec.lines.items())
        if (points := column(records, key))
    ]
    return spec.chart(spec.title, lines)


def _reward(records: Sequence[dict[str, Any]]) -> Chart | None:
    """Mean reward within one standard deviation, or within the extremes where that was not measured."""
    mean = column(records, "nsp/reward/mean")
    if not mean:
        return None
    band: Band | None = None
    if deviations := dict(finite(column(records, "nsp/reward/std"))):
        low, high = ([_offset(point, deviations, sign) for point in mean] for sign in (-1, 1))
        band = Band("± one standard deviation", low, high, color=1)
    elif (low := column(records, "nsp/reward/min")) and (high := column(records, "nsp/reward/max")):
        band = Band("lowest to highest", low, high, color=1)
    return Chart("Reward", "per rollout", [Line("mean", mean, color=1, noisy=True)], band=band)


def _offset(point: Point, deviations: dict[float, float], sign: int) -> Point:
    step, value = point
    return step, None if value is None or step not in deviations else value + sign * deviations[step]


def task_keys(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the metrics `val/<task>/<metric>`, in the order in which they first came."""
    keys = dict.fromkeys(key for record in records for key in record if is_validation(key))
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
            shown = enumerate(tasks[start : start + MAX_COLORS], start=1)
            charts.append(Chart(f"Validation: {metric}", metric, [Line(*task, color) for color, task in shown]))
    return charts


def _times(records: Sequence[dict[str, Any]]) -> Chart | None:
    """Where the time of a step goes; what no part accounts for is shown as `other`."""
    lines = [Line(label, points, color) for label, names, color in TIMES if (points := _sum(records, names))]
    tables = [dict(finite(line.points)) for line in lines]
    rest: list[Point] = [
        (step, max(total - sum(table.get(step, 0.0) for table in tables), 0.0))
        for step, total in finite(column(records, "timing_s/step"))
    ]
    if any(value for _, value in rest):
        lines.append(Line("other", rest, color=5))
    return Chart("Time per step", "seconds", lines, stacked=True) if lines else None


def _between_steps(records: Sequence[dict[str, Any]]) -> Chart | None:
    """Validation and checkpoints, which `timing_s/step` does not count."""
    lines = [
        Line(name.replace("_", " "), points, color)
        for name, color in BETWEEN_STEPS
        if finite(points := column(records, f"timing_s/{name}"))
    ]
    return Chart("Time between steps", "seconds, each time", lines, from_zero=True) if lines else None


def _sum(records: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Point]:
    """Sum of the finite times of `names` at every step that has one."""
    total: dict[float, float] = {}
    for name in names:
        for step, value in finite(column(records, f"timing_s/{name}")):
            total[step] = total.get(step, 0.0) + value
    return sorted(total.items())
