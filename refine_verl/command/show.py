"""Tables and progress of the commands."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

TEXT_WIDTH, TABLE_WIDTH = 160, 200
"""Of what goes to a file or a pipe, which have no width of their own; no cell is to be cut."""


_NO_TEXT = ("true", "false", "null", "nan", "inf")
_PLAIN = re.compile(r"([A-Za-z_~/]|\.\.?/)([\w./~:+@% -]*[\w./~:+@%-])?", re.ASCII)
"""What Hydra takes for a text without quotes."""


def console(width: int = TEXT_WIDTH) -> Console:
    """Standard output, as wide as the terminal, or ``width`` where it is none."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], notes: Sequence[str] = ()) -> None:
    """A table on standard output, and sentences below it."""
    shown = console(TABLE_WIDTH)
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
    shown.print(table, markup=False)
    for note in notes:
        shown.print(note, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(description: str, total: int | None, done: int = 0) -> Iterator[Any]:
    """A bar on standard error, where that is a terminal; call what is yielded with the number of steps done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda steps=1: progress.advance(task, steps)


def typed(key: str, value: object) -> str:
    """A key of a run with a path, as one types it: quoted for the shell, and for Hydra where it is more than a word.

    >>> print(typed("data.val_files", "a b"))
    'data.val_files=a b'
    """
    text = str(value)
    if text.lower() in _NO_TEXT or not _PLAIN.fullmatch(text):
        text = '"' + text.replace('"', '\\"') + '"'
    return shlex.quote(f"{key}={text}")


def spread(lengths: Sequence[int]) -> tuple[int | str, int | str, int | str]:
    """Smallest, mean and largest, for three columns of a table; dashes for nothing."""
    return (min(lengths), round(sum(lengths) / len(lengths)), max(lengths)) if lengths else ("-", "-", "-")
