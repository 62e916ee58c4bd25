"""Differences between runs on the same samples, with paired bootstrap intervals."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refine_verl.config import ConfigError
from refine_verl.evaluate.console import INSTALL
from refine_verl.evaluate.results import RESULTS_FILE, Row, aggregate, read_results, read_samples
from refine_verl.evaluate.settings import ADAPTS
from refine_verl.evaluate.tables import Table, task_label

RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 0
Key = tuple[str, str, "int | None", str]
"""Group, task, length and metric."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a directory of results holds."""

    directory: Path
    content: dict[str, Any]
    rows: dict[Key, Row]


def compare(directories: Sequence[str]) -> tuple[list[Table], list[str]]:
    """Compare each run with the first one.

    Returns:
        A table per pair of runs, and what is to be known of all of them.

    Raises:
        ConfigError: fewer than two runs, a directory without results, other conventions, other samples, or nothing
            in common.
    """
    if len(directories) < 2:
        raise ConfigError("compare", "needs at least two directories of results: compare RUN_A RUN_B.")
    first, *others = [_read(Path(name).expanduser()) for name in directories]
    tables, notes = [], []
    for other in others:
        _check(first, other)
        for one, two in ((first, other), (other, first)):
            if alone := sorted({task for _, task, *_ in one.rows.keys() - two.rows.keys()}):
                notes.append(f"Only in {one.directory}: {', '.join(alone)}.")
        tables.append(_table(first, other))
    percent = round(100 * CONFIDENCE)
    notes.append(
        f"Intervals hold {percent} % of {RESAMPLES} bootstrap resamples of the samples, both runs resampled together; "
        "* marks those without 0. They know nothing of other seeds of training."
    )
    return tables, notes


def bootstrap_difference(kind: str, before: np.ndarray, after: np.ndarray) -> tuple[float, float] | None:
    """Percentile interval of `aggregate(after) - aggregate(before)`, samples resampled in pairs; None for one sample.

    Args:
        kind: see `results.aggregate`.
        before, after: [N], or [N, 2], scores of the same samples in the same order.
    """

    def difference(rows: np.ndarray) -> float:
        return aggregate(kind, after[rows]) - aggregate(kind, before[rows])

    return _interval([np.arange(len(before))], difference, vectorized=False)


def bootstrap_average(differences: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Percentile interval of the mean of tasks' mean differences; the samples of each task are resampled apart.

    Args:
        differences: [N] per task.
    """

    def average(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean([part.mean(axis=axis) for part in parts], axis=0)

    return _interval(differences, average, vectorized=True)


def _interval(
    samples: Sequence[np.ndarray], statistic: Callable[..., Any], *, vectorized: bool
) -> tuple[float, float] | None:
    if min(map(len, samples)) < 2:
        return None
    try:
        from scipy.stats import bootstrap
    except ModuleNotFoundError as error:
        raise ConfigError("compare", f"needs scipy, which is not installed. Install it with: {INSTALL}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns where all resamples agree; the interval is that value
        found = bootstrap(
            tuple(samples),
            statistic,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            vectorized=vectorized,
            rng=np.random.default_rng(SEED),
        ).confidence_interval
    return float(found.low), float(found.high)


def _read(directory: Path) -> Run:
    path = directory / RESULTS_FILE
    try:
        content, rows = read_results(path)
        content["convention"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("compare", f"{path} cannot be read as results ({error}).") from error
    return Run(directory, content, {(row.group, row.task, row.length, row.metric): row for row in rows})


def _check(first: Run, other: Run) -> None:
    conventions = {run.content["convention"] for run in (first, other)} - {None}  # None: no task is scored by one
    if len(conventions) > 1:
        raise ConfigError(
            "compare",
            f"{first.directory} is scored in the convention {first.content['convention']!r} and {other.directory} in "
            f"{other.content['convention']!r}; their numbers do not compare. Evaluate both with the same convention=.",
        )
    common = first.rows.keys() & other.rows.keys()
    if not common:
        raise ConfigError("compare", f"{first.directory} and {other.directory} have no task and length in common.")
    for key in sorted(common, key=str):
        if first.rows[key].fingerprint != other.rows[key].fingerprint:
            counts = [run.rows[key].samples for run in (first, other)]
            raise ConfigError(
                "compare",
                f"{first.rows[key].task}: {first.directory} has {counts[0]} samples and {other.directory} "
                f"{counts[1]}, and they are not the same ones (limit, lengths, data, tokenizer or seed differ). "
                "Evaluate both on the same samples.",
            )


def _values(run: Run, key: Key) -> tuple[list[str], np.ndarray]:
    """Ids and scores of a task's samples, in the order in which they were asked."""
    name, metric, wanted = run.rows[key].name, key[-1], run.rows[key].samples
    records = read_samples(run.directory, name)[:wanted]
    if len(records) < wanted or any(metric not in record for record in records):
        raise ConfigError("compare", f"{run.directory} lacks samples of {name}: {len(records)} of {wanted} are there.")
    return [record["id"] for record in records], np.array([record[metric] for record in records], np.float64)


def _pairs(first: Run, other: Run, key: Key) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the same samples in both runs."""
    (ids, before), (others, after) = _values(first, key), _values(other, key)
    places = {identifier: place for place, identifier in enumerate(others)}
    if set(ids) != set(places):
        raise ConfigError(
            "compare", f"{key[1]}: the files of {first.directory} and {other.directory} name other samples."
        )
    return before, after[[places[identifier] for identifier in ids]]


def _table(first: Run, other: Run) -> Table:
    rows, notes = [], []
    parts: dict[str, dict[Key, np.ndarray]] = {}
    for key in [key for key in first.rows if key in other.rows]:
        group, task, length, metric = key
        kind = first.rows[key].aggregate
        before, after = _pairs(first, other, key)
        scale = 100.0 if kind == "mean" and metric != "ntp_loss" else 1.0
        values = [aggregate(kind, before), aggregate(kind, after)]
        interval = bootstrap_difference(kind, before, after)
        rows.append(_line(f"{task_label(task, length)} {metric}", values, interval, len(before), scale))
        if group in ADAPTS:
            parts.setdefault(group, {})[key] = after - before
    for group, differences in parts.items():
        if len(differences) > 1:
            means = [float(np.mean([run.rows[key].value for key in differences])) for run in (first, other)]
            interval = bootstrap_average([*differences.values()])
            count = sum(map(len, differences.values()))
            if interval is None:
                single = [task_label(key[1], key[2]) for key in differences if first.rows[key].samples < 2]
                notes.append(
                    f"No interval for the average of {group}: of a single sample ({', '.join(single)}) there is none."
                )
            rows.append(_line(f"Avg of {len(differences)}, {group}", means, interval, count, 100.0))
    percent = f"{round(100 * CONFIDENCE)} % interval"
    header = ["", str(first.directory), str(other.directory), "difference", percent, "n"]
    return Table(f"{other.directory} against {first.directory}", header, rows, notes)


def _line(
    name: str, values: Sequence[float], interval: tuple[float, float] | None, count: int, scale: float
) -> list[str]:
    digits = 1 if scale == 100 else 3
    shown = "–"
    if interval is not None:
        low, high = interval
        shown = f"{scale * low:+.{digits}f} ... {scale * high:+.{digits}f}" + (" *" if low > 0 or high < 0 else "")
    numbers = [f"{scale * value:.{digits}f}" for value in values]
    return [name, *numbers, f"{scale * (values[1] - values[0]):+.{digits}f}", shown, str(count)]
