"""Several runs on one page: their curves over each other, their final values, and the settings in which they differ."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from refine_verl.record.format import format_duration, format_number
from refine_verl.record.metrics import METRICS_FILE
from refine_verl.record.run import CONFIG_FILE, ENVIRONMENT_FILE, ReportError, Run, read_run
from refine_verl.report.charts import COST, LEARNING, SPECS, ChartSpec, is_validation, task_keys
from refine_verl.report.html import chart_section
from refine_verl.report.markup import Markup, el
from refine_verl.report.page import header, number_cells, render_page, sample, table_card, write_page
from refine_verl.report.series import Point, column, final_value, finite
from refine_verl.report.settings import differences
from refine_verl.report.svg import Axis, Chart, Line, line_marker, line_style

COMPARISON_FILE = "comparison.html"
COLORS = PATTERNS = 6
MAX_RUNS = COLORS * PATTERNS
ALWAYS_DIFFERENT = ("trainer.default_local_dir", "trainer.experiment_name")
HIGHER_IS_BETTER = ("nsp/reward", "val/ntp_accuracy", "answer/reward")
LOWER_IS_BETTER = ("val/ntp_loss", "actor/ntp_loss", "answer/ntp_loss", "ttt/loss_after")

AXES: dict[str, Axis] = {
    "step": Axis(),
    "tokens": Axis(label="document tokens", one="token", many="tokens", whole=False),
    "time": Axis(label="seconds of training steps", one="second", many="seconds", whole=False),
}
"""What the curves can be drawn over."""
AMOUNTS = {"tokens": ("timing_s/step", "perf/tokens_per_second"), "time": ("timing_s/step",)}
"""Metrics whose product is what a step adds on an axis."""


@dataclass(frozen=True)
class Entry:
    """A run of the comparison: its name here, its line style, and its records with `step` on the common axis."""

    run: Run
    label: str
    color: int
    pattern: int
    records: list[dict[str, Any]]

    def line(self, points: Sequence[Point], noisy: bool) -> Line:
        """A line of this run."""
        return Line(self.label, points, self.color, noisy, self.pattern)


def write_comparison(
    run_dirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None, axis: str = "step"
) -> Path:
    """Write one page about several runs, finished or not, of any lengths.

    Args:
        run_dirs: two or more run directories with `metrics.jsonl`.
        out: the file to write; `comparison.html` in the working directory by default.
        axis: a key of `AXES`; tokens and time are summed up from what the steps logged.

    Returns:
        The path written.

    Raises:
        ReportError: a directory without metrics or given twice, too many runs, or steps without tokens or time.
        MetricsError: a damaged metrics file.
    """
    directories = [Path(directory) for directory in run_dirs]
    resolved = [directory.resolve() for directory in directories]
    for directory in directories:
        if resolved.count(directory.resolve()) > 1:
            raise ReportError(f"{directory}: given twice; name each run once")
    if len(directories) > MAX_RUNS:
        raise ReportError(
            f"{len(directories)} runs: at most {MAX_RUNS} lines can be told apart; compare fewer at a time"
        )
    target = Path(out) if out is not None else Path(COMPARISON_FILE)
    if target.is_dir():
        raise ReportError(f"{target} is a directory; give a file, {target / COMPARISON_FILE} say")
    return write_page(target, render_comparison([read_run(directory) for directory in directories], axis))


def render_comparison(runs: Sequence[Run], axis: str) -> str:
    """The page as text; see `write_comparison`."""
    entries = [
        Entry(run, label, index % COLORS + 1, (index + index // COLORS) % PATTERNS + 1, _on_axis(run, axis))
        for index, (run, label) in enumerate(zip(runs, _labels(runs), strict=True))
    ]
    charts, names = _charts(entries, AXES[axis]), [entry.label for entry in entries]
    return render_page(
        f"{', '.join(names)} · REFINE runs",
        header("REFINE runs", f"{len(entries)} runs compared", [f"curves by {AXES[axis].label}"]),
        _runs(entries),
        *(chart_section(section, found) for section, found in charts.items()),
        _final_values(entries),
        differences("Settings that differ", CONFIG_FILE, names, [run.config for run in runs], ALWAYS_DIFFERENT),
        differences(
            "Environments that differ", ENVIRONMENT_FILE, names, [run.environment for run in runs], ("started",)
        ),
        el("footer", f"Drawn from {METRICS_FILE} by python -m refine_verl.report"),
    )


def _labels(runs: Sequence[Run]) -> list[str]:
    """Names of the runs; those that are not unique are told apart by their directories."""
    names = [run.name for run in runs]
    paths = [run.directory.resolve().parts for run in runs]
    shared = len(os.path.commonprefix(paths))
    return [
        f"{name} ({'/'.join(path[shared:])})" if names.count(name) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]


def _on_axis(run: Run, axis: str) -> list[dict[str, Any]]:
    """The records with `step` replaced by the place on the axis, which is what was done up to the step's end."""
    if axis == "step":
        return run.records
    amounts = [_amount(record, axis) for record in run.records]
    if all(amount is None for amount in amounts):
        needed = " and ".join(AMOUNTS[axis])
        raise ReportError(f"{run.directory}: its steps have no {needed}, so there is no {axis} axis; leave --x out")
    places = accumulate(amount or 0.0 for amount in amounts)
    return [{**record, "step": place} for record, place in zip(run.records, places, strict=True)]


def _amount(record: Mapping[str, Any], axis: str) -> float | None:
    """Tokens or seconds of a step, None where it did not log them."""
    values: list[Any] = [record.get(key) for key in AMOUNTS[axis]]
    return float(math.prod(values)) if all(isinstance(value, (int, float)) for value in values) else None


# Curves


def _charts(entries: Sequence[Entry], axis: Axis) -> dict[str, list[Chart]]:
    """One chart per metric with a line per run that has it, by section."""
    places = [record["step"] for entry in entries for record in entry.records]
    charts: dict[str, list[Chart]] = {section: [] for section in SPECS}
    for section, spec, key, title in _metrics(entries):
        averaged = not is_validation(key)
        columns = [(entry, column(entry.records, key)) for entry in entries]
        lines = [entry.line(points, spec.noisy and averaged) for entry, points in columns if points]
        if chart := spec.chart(title, lines, steps=(min(places), max(places)), axis=axis, tail=averaged):
            charts[section].append(chart)
    return {section: found for section, found in charts.items() if found}


def _metrics(entries: Sequence[Entry]) -> Iterator[tuple[str, ChartSpec, str, str]]:
    """(section, how to draw, metric, title) of every chart, in the order of a single run's report."""
    reward = ChartSpec("Reward", "reward that trains, mean over rollouts", {})
    yield LEARNING, reward, "nsp/reward/mean", reward.title
    for section, specs in SPECS.items():
        for spec in specs:
            for key, label in spec.lines.items():
                alone = len(spec.lines) == 1 or label == spec.title.lower()
                yield section, spec, key, spec.title if alone else f"{spec.title}: {label}"
    for key in task_keys([record for entry in entries for record in entry.records]):
        name = key.removeprefix("val/")
        yield LEARNING, ChartSpec(name, "validation", {}), key, f"Validation: {name}"
    step = ChartSpec("Time per step", "seconds", {}, from_zero=True)
    yield COST, step, "timing_s/step", step.title


# Tables


def _runs(entries: Sequence[Entry]) -> Markup:
    """The legend of the page: each run's line, how far it came, and what it took."""
    rows = []
    for entry in entries:
        seconds = sum(value for _, value in finite(column(entry.run.records, "timing_s/step")))
        tokens = sum(_amount(record, "tokens") or 0.0 for record in entry.run.records)
        line = entry.line((), noisy=False)
        drawn = el("span", sample("M0 5H20", line_style(line), line_marker(line, 10, 5)), class_="swatch")
        cells = [
            entry.run.progress,
            format_number(tokens) if tokens else "–",
            format_duration(seconds) if seconds else "–",
            f"{entry.run.written:%Y-%m-%d %H:%M} UTC",
        ]
        rows.append(el("tr", el("th", drawn, entry.label), *number_cells(cells)))
    head = ("run", "done", "document tokens", "training steps took", "last measured")
    return el("section", table_card(head, rows, numbers=True), aria_label="Runs")


def _final_values(entries: Sequence[Entry]) -> Markup:
    """The last value of what is validated, and the mean of the last tenth of what is noisy; the best is bold."""
    rows = []
    for _, spec, key, title in _metrics(entries):
        finals = [_final(column(entry.run.records, key), key) for entry in entries]
        if any(finals):
            cells = _final_cells(key, finals, spec.percent)
            rows.append(el("tr", el("th", title, " ", el("code", key)), *cells))
    note = el(
        "p",
        "Validation: the last value. Everything else: the mean of the last tenth of the steps. Where runs end at "
        "different steps, each value has the step it ends at. Bold: the best of those that came furthest, where that "
        "is not a matter of taste.",
        class_="note",
    )
    head = ("metric", *(entry.label for entry in entries))
    return el("section", el("h2", "Final values"), table_card(head, rows, numbers=True), note)


def _final_cells(key: str, finals: Sequence[tuple[float, float] | None], percent: bool) -> Iterator[Markup]:
    """A cell per run; a run that stopped earlier is not ranked with those that trained longer."""
    furthest = max(end for end, _ in filter(None, finals))
    apart = any(end < furthest for end, _ in filter(None, finals))
    best = _best(key, [value for end, value in filter(None, finals) if end == furthest])
    for final in finals:
        text = format_number(final[1] if final else None, percent=percent)
        shown = el("b", text) if final is not None and final == (furthest, best) else text
        step = el("small", f" at {final[0]:g}") if final and apart else None
        yield el("td", shown, step, class_="number")


def _final(points: Sequence[Point], key: str) -> tuple[float, float] | None:
    """(last step with a value, final value)"""
    value = final_value(points, tail=not is_validation(key))
    return None if value is None else (finite(points)[-1][0], value)


def _best(key: str, values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    if key.startswith(HIGHER_IS_BETTER) or task_keys([{key: 0.0}]):  # all scores of answers are better when higher
        return max(values)
    return min(values) if key in LOWER_IS_BETTER else None
