"""`report.html`: one self-contained page per run, drawn from `metrics.jsonl` and what lies beside it.

No script, no font and nothing from elsewhere: the page can be mailed, archived and opened without a network.
Its own content policy refuses anything else.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from refine_verl.report.charts import build_charts
from refine_verl.report.format import format_number
from refine_verl.report.headline import Headline, headlines
from refine_verl.report.markup import Markup, el, join
from refine_verl.report.metrics import METRICS_FILE, merge_steps, read_metrics, write_atomically
from refine_verl.report.series import column, finite
from refine_verl.report.style import STYLE
from refine_verl.report.svg import Chart, render_chart, smoothing_window

__all__ = ["CONFIG_FILE", "ENVIRONMENT_FILE", "REPORT_FILE", "ReportError", "write_report"]

CONFIG_FILE, ENVIRONMENT_FILE, REPORT_FILE = "config.yaml", "environment.json", "report.html"
SECRET_KEY = re.compile(r"(^|_)(api_?key|secret|password|credentials?|(hf|access|auth)_?token)$", re.IGNORECASE)
NUMBER_COLUMNS = ("first", "last", "lowest", "highest", "mean", "steps")
NUMBER_GROUPS = ("val", "nsp", "actor", "perf", "timing_s")  # their order in the table; others follow
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

logger = logging.getLogger(__name__)


class ReportError(ValueError):
    """There is nothing to report on: the message says what is missing and where it was looked for."""


def write_report(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run, finished or still running.

    Args:
        run_dir: a run directory with `metrics.jsonl` and, if there, `config.yaml` and `environment.json`.
        out: the file to write; `report.html` in the run directory by default.

    Returns:
        The path written.

    Raises:
        ReportError: the directory has no metrics.
        MetricsError: its metrics file is damaged.
    """
    directory = Path(run_dir)
    target = Path(out) if out is not None else directory / REPORT_FILE
    page = render_report(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page.encode())
    return target


def render_report(directory: Path) -> str:
    """The page as text; see `write_report`."""
    metrics_path = directory / METRICS_FILE
    if not metrics_path.is_file():
        raise ReportError(f"{directory}: no {METRICS_FILE} there; give the directory of a run that has started")
    records = merge_steps(read_metrics(metrics_path))
    if not records:
        raise ReportError(f"{metrics_path}: no complete line yet; wait for the first step")
    config = _load_config(directory / CONFIG_FILE)
    environment = _load_environment(directory / ENVIRONMENT_FILE)
    title = _title(directory, config)
    body = el(
        "main",
        _header(title, records, config, metrics_path),
        el("section", *map(_tile, headlines(records)), class_="tiles", aria_label="Key figures"),
        *(_charts(section, charts) for section, charts in build_charts(records).items()),
        _numbers(records),
        _settings(config),
        _environment(environment),
        el("footer", f"Drawn from {METRICS_FILE} by python -m refine_verl.report"),
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=CONTENT_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"{title} · REFINE run"),
        el("style", Markup(STYLE)),
    )
    return "<!DOCTYPE html>\n" + el("html", head, el("body", body), lang="en") + "\n"


def _load_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        logger.warning("%s: not read, the report shows no settings: %s", path, error)
        return {}
    return config if isinstance(config, dict) else {}


def _load_environment(path: Path) -> dict[str, Any]:
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("%s: not read, the report shows no environment: %s", path, error)
        return {}
    return environment if isinstance(environment, dict) else {}


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _title(directory: Path, config: Mapping[str, Any]) -> str:
    return str(_lookup(config, "trainer.experiment_name") or directory.resolve().name)


def _header(title: str, records: Sequence[dict[str, Any]], config: Mapping[str, Any], metrics_path: Path) -> Markup:
    last = records[-1]["step"]
    total = _lookup(config, "trainer.total_training_steps")
    running = isinstance(total, int) and last < total
    written = datetime.fromtimestamp(metrics_path.stat().st_mtime, tz=timezone.utc)
    facts = [
        f"{last} of {total} steps" if running else f"{last} steps" if last != 1 else "1 step",
        f"last measured {written:%Y-%m-%d %H:%M} UTC",
    ]
    model = _lookup(config, "model.path") or _lookup(config, "actor_rollout_ref.model.path")
    if model:
        facts.insert(0, f"model {model}")
    project = _lookup(config, "trainer.project_name")
    return el(
        "header",
        el("p", "REFINE run" + (f" · {project}" if project else ""), class_="kicker"),
        el("h1", title),
        el("p", " · ".join(facts), class_="facts"),
    )


def _tile(headline: Headline) -> Markup:
    unit = el("small", " " + headline.unit) if headline.unit else None
    change = join(" ", el("small", headline.change, class_=headline.verdict or None)) if headline.change else None
    return el(
        "div",
        el("p", headline.name, class_="name"),
        el("p", headline.value, unit, change, class_="value"),
        el("p", headline.detail, class_="detail"),
        class_="tile",
    )


def _charts(section: str, charts: Sequence[Chart]) -> Markup:
    return el("section", el("h2", section), el("div", *(_figure(chart) for chart in charts), class_="charts"))


def _figure(chart: Chart) -> Markup:
    caption = el("figcaption", el("h3", chart.title, el("span", chart.unit, class_="unit")), _legend(chart))
    return el("figure", caption, render_chart(chart), class_="card")


def _legend(chart: Chart) -> Markup:
    """Line samples with the last value of each, or the share of a stacked part."""
    items = []
    totals = [sum(value for _, value in finite(line.points)) for line in chart.lines]
    for line, total in zip(chart.lines, totals, strict=True):
        if chart.stacked:
            sample, text = (
                _sample("M4 0H16V10H4Z", f"fill c{line.color}"),
                f"{total / (sum(totals) or 1):.0%}",
            )
        else:
            last = next((value for _, value in reversed(finite(line.points))), None)
            sample, text = (
                _sample("M0 5H20", f"line c{line.color}"),
                format_number(last, percent=chart.percent),
            )
        items.append(el("li", sample, line.label, " ", el("b", text)))
    if chart.band:
        items.append(el("li", _sample("M0 0H20V10H0Z", f"band c{chart.band.color}"), chart.band.label))
    if window := max(smoothing_window(line) for line in chart.lines):
        items.append(el("li", f"bold: {window}-step mean"))
    return el("ul", *items, class_="legend")


def _sample(shape: str, style: str) -> Markup:
    return el("svg", el("path", class_=style, d=shape), viewBox="0 0 20 10", aria_hidden="true")


def _numbers(records: Sequence[dict[str, Any]]) -> Markup:
    """Every metric of the run: first, last, lowest, highest, mean."""
    keys = dict.fromkeys(key for record in records for key in record if key != "step")
    head = el("tr", el("th", "metric"), *(el("th", name, class_="number") for name in NUMBER_COLUMNS))
    rows = [row for key in sorted(keys, key=_rank) if (row := _number_row(key, records))]
    table = el("table", el("thead", head), el("tbody", *rows))
    return el("section", el("h2", "Final numbers"), el("div", el("div", table, class_="panel"), class_="card"))


def _rank(key: str) -> tuple[int, str]:
    group = key.split("/")[0]
    return (NUMBER_GROUPS.index(group) if group in NUMBER_GROUPS else len(NUMBER_GROUPS)), key


def _number_row(key: str, records: Sequence[dict[str, Any]]) -> Markup | None:
    points = column(records, key)
    values = [value for _, value in finite(points)]
    if not points:
        return None
    lost = len(points) - len(values)
    figures: list[float | None] = [None] * 5
    if values:
        figures = [values[0], values[-1], min(values), max(values), sum(values) / len(values)]
    cells = [format_number(figure) for figure in figures]
    count = f"{len(values)}" + (f" ({lost} not finite)" if lost else "")
    return el("tr", el("th", el("code", key)), *(el("td", cell, class_="number") for cell in [*cells, count]))


def _settings(config: Mapping[str, Any]) -> Markup | None:
    if not config:
        return None
    own = config.get("refine")
    rest = {key: value for key, value in config.items() if key != "refine"}
    parts = [el("h2", "Settings")]
    if own:
        parts.append(el("div", el("div", _key_table({"refine": own}), class_="panel"), class_="card"))
    if rest:
        summary = el("summary", f"All other settings ({len(list(_flatten(rest)))})")
        parts.append(el("details", summary, el("div", _key_table(rest), class_="panel"), class_="card"))
    return el("section", *parts)


def _environment(environment: Mapping[str, Any]) -> Markup | None:
    if not environment:
        return None
    table = el("div", _key_table(environment), class_="panel")
    return el("section", el("h2", "Environment"), el("div", table, class_="card"))


def _key_table(tree: Mapping[str, Any]) -> Markup:
    rows = [
        el("tr", el("th", key, class_="key"), el("td", el("code", _setting(key, value)), class_="setting"))
        for key, value in _flatten(tree)
    ]
    return el("table", el("tbody", *rows))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _setting(key: str, value: Any) -> str:
    """The value as it would be typed; a secret is never written into a page that gets passed on."""
    if value is not None and SECRET_KEY.search(key.rpartition(".")[2]):
        return "(hidden)"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
