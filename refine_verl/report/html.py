"""`report.html`: one self-contained page per run, drawn from `metrics.jsonl` and what lies beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_verl.record.format import format_number
from refine_verl.record.metrics import METRICS_FILE
from refine_verl.record.run import Run, lookup, read_run
from refine_verl.report.charts import build_charts
from refine_verl.report.headline import headlines
from refine_verl.report.markup import Markup, el
from refine_verl.report.page import (
    card,
    figure,
    header,
    key_table,
    number_cells,
    render_page,
    sample,
    table_card,
    write_page,
)
from refine_verl.report.series import column, final_value, finite
from refine_verl.report.settings import settings_section
from refine_verl.report.svg import Chart, line_marker, line_style, render_chart, smoothing_window

REPORT_FILE = "report.html"
NUMBER_COLUMNS = ("metric", "first", "last", "lowest", "highest", "mean", "steps")
NUMBER_GROUPS = ("val", "nsp", "actor", "answer", "ttt", "perf", "timing_s")  # their order; others follow


def write_report(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run, finished or still running.

    Args:
        run_dir: a run directory with `metrics.jsonl` and, if there, `config.yaml`, `overrides.yaml` and
            `environment.json`.
        out: the file to write; `report.html` in the run directory by default.

    Returns:
        The path written.

    Raises:
        ReportError: the directory has no metrics.
        MetricsError: its metrics file is damaged.
    """
    directory = Path(run_dir)
    run = read_run(directory)
    page = render_page(
        f"{run.name} · REFINE run",
        _header(run),
        el("section", *headlines(run.records), class_="tiles", aria_label="Key figures"),
        *(chart_section(section, charts) for section, charts in build_charts(run.records).items()),
        _numbers(run.records),
        settings_section(run.config, run.overrides),
        _environment(run.environment),
        el("footer", f"Drawn from {METRICS_FILE} by python -m refine_verl.report"),
    )
    return write_page(Path(out) if out is not None else directory / REPORT_FILE, page)


def _header(run: Run) -> Markup:
    facts = [run.progress, f"last measured {run.written:%Y-%m-%d %H:%M} UTC"]
    model = lookup(run.config, "model.path") or lookup(run.config, "actor_rollout_ref.model.path")
    if model:
        facts.insert(0, f"model {model}")
    project = lookup(run.config, "trainer.project_name")
    return header("REFINE run" + (f" · {project}" if project else ""), run.name, facts)


def chart_section(section: str, charts: Sequence[Chart]) -> Markup:
    figures = (figure(chart.title, chart.unit, _legend(chart), render_chart(chart), "card") for chart in charts)
    return el("section", el("h2", section), el("div", *figures, class_="charts"))


def _legend(chart: Chart) -> Markup:
    """Line samples with the final value of each, or the share of a stacked part."""
    totals = [sum(value for _, value in finite(line.points)) for line in chart.lines]
    items = []
    for line, total in zip(chart.lines, totals, strict=True):
        if chart.stacked:
            drawn, text = sample("M4 0H16V10H4Z", f"fill c{line.color}"), f"{total / (sum(totals) or 1):.0%}"
        else:
            drawn = sample("M0 5H20", line_style(line), line_marker(line, 10, 5))
            text = format_number(final_value(line.points, tail=bool(chart.tail)), percent=chart.percent)
        items.append(el("li", drawn, line.label, " ", el("b", text)))
    if chart.band:
        items.append(el("li", sample("M0 0H20V10H0Z", f"band c{chart.band.color}"), chart.band.label))
    if window := max(smoothing_window(line) for line in chart.lines):
        items.append(el("li", f"bold: {window}-step mean"))
    if chart.tail is not None:
        items.append(el("li", "figures: mean of the last tenth" if chart.tail else "figures: last value"))
    return el("ul", *items, class_="legend")


def _numbers(records: Sequence[dict[str, Any]]) -> Markup:
    """Every metric of the run: first, last, lowest, highest, mean."""
    keys = {key for record in records for key in record} - {"step"}
    rows = [_number_row(key, records) for key in sorted(keys, key=_rank)]
    return el("section", el("h2", "Final numbers"), table_card(NUMBER_COLUMNS, rows, numbers=True))


def _rank(key: str) -> tuple[int, str]:
    group = key.split("/")[0]
    return (NUMBER_GROUPS.index(group) if group in NUMBER_GROUPS else len(NUMBER_GROUPS)), key


def _number_row(key: str, records: Sequence[dict[str, Any]]) -> Markup | None:
    points = column(records, key)
    if not points:
        return None
    values = [value for _, value in finite(points)]
    figures = [values[0], values[-1], min(values), max(values), sum(values) / len(values)] if values else [None] * 5
    lost = f" ({len(points) - len(values)} not finite)" if len(points) > len(values) else ""
    return el("tr", el("th", el("code", key)), *number_cells([*map(format_number, figures), f"{len(values)}{lost}"]))


def _environment(environment: Mapping[str, Any]) -> Markup | None:
    return el("section", el("h2", "Environment"), card(key_table(environment))) if environment else None
