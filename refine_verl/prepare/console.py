"""What the commands show: a progress bar while they work, a table at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError, is_made_of_documents
from refine_verl.data.tokenizers import load_tokenizer


@contextmanager
def progress_bar(description: str, total: int | None, done: int = 0) -> Iterator[Any]:
    """A bar on standard error, where that is a terminal; call what is yielded with the number of steps done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda steps=1: progress.advance(task, steps)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], notes: Sequence[str] = ()) -> None:
    """The command's deliberate output: a table on standard output, and sentences below it."""
    # A pipe has no width of its own: wide enough that no cell is cut.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
    console.print(table)
    for note in notes:
        console.print(note, markup=False)


def spread(lengths: Sequence[int]) -> tuple[Any, Any, Any]:
    """Smallest, mean and largest, or dashes for nothing."""
    return (min(lengths), round(float(np.mean(lengths))), max(lengths)) if len(lengths) else ("-", "-", "-")


def command_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer `--tokenizer` names.

    Raises:
        DataError: nothing loadable there, or `bpe:SIZE`, which would have to be trained first.
    """
    if is_made_of_documents(spec):
        raise DataError(
            f"--tokenizer {spec} would be trained on a run's own documents. Give the tokenizer's directory (a run "
            "saves it with its model), a hub id, or bytes."
        )
    return load_tokenizer(spec)


def require_at_least(option: str, value: int, minimum: int) -> None:
    """Refuse a number below `minimum`, by the name of its option."""
    if value < minimum:
        raise DataError(f"{option} {value} must be at least {minimum}.")


def existing(path: str) -> Path | None:
    """`path` where it exists, else None (a hub id, perhaps)."""
    found = Path(path).expanduser()
    return found if found.exists() else None
