"""Tables in the layout of the paper (Tables 3, 4, 5 and E.1)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from refine_verl.evaluate.results import Row
from refine_verl.evaluate.settings import GROUPS, LABELS, LONGBENCH, OTHERS, SHORT_COLUMNS

TITLES = {
    "ruler_niah": "RULER NIAH (the paper's Table 3)",
    "ruler_qa": "RULER QA (Table 4)",
    "longbench": "LongBench (Table 5)",
    "short_context": "Short-context tasks (Table E.1)",
    "ntp": "Next-token prediction",
}
AVERAGED = ("LMB acc", "PIQA acc", "Hella acc_n", "Wino acc", "ARC-e acc", "ARC-c acc_n")
"""Columns of Table E.1 that its Avg is of (checked on the paper's own numbers)."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text cells, and lines to be read with it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)

    def markdown(self) -> str:
        """The table in Markdown, with its title above and its notes below."""
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        notes = [part for note in self.notes for part in (note, "")]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", *notes])


def build_tables(rows: Sequence[Row], label: str) -> list[Table]:
    """One table per group that has results: a row called `label`, and its standard errors in a row below."""
    tables = []
    for group, title in TITLES.items():
        mine = [row for row in rows if row.group == group]
        if mine:
            order = [*GROUPS[group], *OTHERS.get(group, ())]
            in_order = sorted(mine, key=lambda row: (order.index(row.task), row.length or 0, row.metric))
            columns = _BUILDERS.get(group, _by_length)(in_order)
            values = [label, *(text for _, text, _ in columns)]
            errors = ["standard error", *(error for *_, error in columns)]
            tables.append(
                Table(
                    title,
                    ["Model", *(name for name, *_ in columns)],
                    [values, errors],
                    [*_left_out(mine), *_read_once(mine)],
                )
            )
    return tables


def _left_out(rows: Sequence[Row]) -> list[str]:
    """What the numbers are not about; a length of `ntp` has two rows and is named once."""
    if rows[0].group == "ntp":
        why, what = "shorter than the length", "documents"
    else:
        why, what = "longer than the last of lengths", "samples"
    counts = dict.fromkeys(
        f"{f'at {length_label(row.length)}' if row.length else task_label(row.task)} "
        f"{row.left_out} of {row.left_out + row.samples}"
        for row in rows
        if row.left_out
    )
    return [f"Left out of the {what} that were read, because they are {why}: {', '.join(counts)}."] if counts else []


def _read_once(rows: Sequence[Row]) -> list[str]:
    """What prompts with a common context save."""
    asked, read = sum(row.prompt_tokens for row in rows), sum(row.read_tokens for row in rows)
    if read == asked:
        return []
    return [f"Contexts that several prompts begin with were read once: {read:,} of {asked:,} prompt tokens were read."]


def length_label(length: int) -> str:
    """4096 -> 4K"""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def task_label(task: str, length: int | None = None) -> str:
    """What tables call a task, with its length where it has one."""
    name = LABELS.get(task, task)
    return f"{name} {length_label(length)}" if length else name


Columns = list[tuple[str, str, str]]


def _by_length(rows: Sequence[Row]) -> Columns:
    columns: Columns = []
    for task, found in itertools.groupby(rows, key=lambda row: row.task):
        mine = list(found)
        columns += [_column(task_label(task, row.length), row) for row in mine]
        if len(mine) > 1:
            columns.append(_average(f"{task_label(task)} Avg", mine))
    return columns


def _longbench(rows: Sequence[Row]) -> Columns:
    columns = [_column(task_label(row.task), row) for row in rows]
    counted = [row for row in rows if row.task in LONGBENCH]
    if len(counted) > 1:
        columns.append(_average("Avg" if len(counted) == len(LONGBENCH) else f"Avg of {len(counted)}", counted))
    return columns


def _short(rows: Sequence[Row]) -> Columns:
    by_key = {(row.task, row.metric): row for row in rows}
    shown = {name: by_key[task, metric] for task, metric, name in SHORT_COLUMNS if (task, metric) in by_key}
    columns = [_column(name, row, scale=1 if name.endswith("ppl") else 100) for name, row in shown.items()]
    if shown.keys() >= set(AVERAGED):
        columns.append(_average("Avg", [shown[name] for name in AVERAGED]))
    return columns


def _ntp(rows: Sequence[Row]) -> Columns:
    columns: Columns = []
    for row in rows:
        name = f"{length_label(row.length or 0)} {row.metric.removeprefix('ntp_')}"
        columns.append(_column(name, row, scale=1, digits=3) if row.metric == "ntp_loss" else _column(name, row))
    return columns


_BUILDERS: dict[str, Callable[[Sequence[Row]], Columns]] = {
    "longbench": _longbench,
    "short_context": _short,
    "ntp": _ntp,
}


def _column(name: str, row: Row, scale: float = 100, digits: int = 1) -> tuple[str, str, str]:
    error = "–" if row.stderr is None else f"{scale * row.stderr:.{digits}f}"
    return name, f"{scale * row.value:.{digits}f}", error


def _average(name: str, rows: Sequence[Row]) -> tuple[str, str, str]:
    return name, f"{100 * (sum(row.value for row in rows) / len(rows)):.1f}", ""
