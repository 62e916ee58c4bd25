"""What the driver's terminal shows while a run trains: a bar with the time left, and the figures that matter.

On a terminal the display stays at the bottom and everything else that is printed or logged scrolls above it.
Anywhere else (CI, `ray job logs`, a file) it is one plain line per step.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from refine_verl.record.format import format_change, format_number

# Rich estimates speed from the updates of the last 30 s by default; a step may well take longer than that.
SPEED_WINDOW_SECONDS = 1800.0
MAX_TASK_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table: a metric, its short name, and what a change of it means."""

    key: str
    label: str
    percent: bool = False
    better: int = 0  # +1 higher is better, -1 lower is better, 0 neither
    since_first: bool = False  # show the change since the first time it was measured


FIGURES = (
    Figure(key="nsp/reward/mean", label="reward", better=1, since_first=True),
    Figure(key="actor/ntp_loss", label="next-token loss", better=-1, since_first=True),
    Figure(key="actor/pg_loss", label="policy loss"),
    Figure(key="nsp/entropy/mean", label="entropy"),
    Figure(key="perf/tokens_per_second", label="tokens/s"),
    Figure(key="perf/forward_tokens_per_token", label="forward tokens per token"),
    Figure(key="val/ntp_loss", label="validation loss", better=-1, since_first=True),
    Figure(key="val/ntp_accuracy", label="validation accuracy", percent=True, better=1, since_first=True),
)


class TrainingProgress:
    """Live progress of a run; a context manager.

    Args:
        total_steps: the step the run ends at.
        initial: the step it starts from, not 0 after a resume.
        console: where to show it; standard output by default.
        history: earlier metrics lines of the run (`read_metrics`), so that after a resume changes are still
            counted from the first measurement of the run.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        initial: int = 0,
        console: Console | None = None,
        history: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.total_steps = total_steps
        self.step = initial
        self.console = console or Console()
        self.live = self.console.is_interactive
        self._initial = initial
        self._started = time.monotonic()
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        for record in history:
            self._remember(record)
        if self.live:
            self._build_display()

    def __enter__(self) -> TrainingProgress:
        if self.live:
            terminal = {sys.stdout, sys.stderr}
            self._display.start()
            self._redirect_logging(terminal)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self._display.update(self._render(), refresh=True)
            self._display.stop()
            for handler, stream in self._handlers:
                handler.setStream(stream)
            self._handlers.clear()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show that `step` is done and what it measured; may be called several times for a step."""
        self.step = step
        self._remember(metrics)
        if self.live:
            self._bar.update(self._task, completed=step)
            self._display.update(self._render())
        else:
            self.message(self._line(metrics))

    def message(self, text: str) -> None:
        """Print a line that stays, above the display where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _remember(self, metrics: Mapping[str, Any]) -> None:
        for key, value in metrics.items():
            if _is_finite(value):
                self._first.setdefault(key, float(value))
                self._last[key] = float(value)

    def _figures(self) -> list[Figure]:
        """The known figures, then the first few tasks of `val/<task>/<metric>`."""
        known = {figure.key for figure in FIGURES}
        tasks = [key for key in self._last if key.startswith("val/") and key not in known][:MAX_TASK_ROWS]
        return [*FIGURES, *(Figure(key=key, label=key.removeprefix("val/"), since_first=True) for key in tasks)]

    def _change(self, figure: Figure) -> str:
        first, last = self._first[figure.key], self._last[figure.key]
        if not figure.since_first or first == last:
            return ""
        return format_change(first, last, percent=figure.percent)

    def _line(self, metrics: Mapping[str, Any]) -> str:
        parts = [f"training {self.step}/{self.total_steps}"]
        for figure in self._figures():
            if figure.key not in metrics:
                continue
            if not _is_finite(metrics[figure.key]):
                parts.append(f"{figure.label} not finite")
                continue
            change = self._change(figure) if figure.key.startswith("val/") else ""
            value = format_number(self._last[figure.key], percent=figure.percent)
            parts.append(f"{figure.label} {value}" + (f" ({change})" if change else ""))
        done = self.step - self._initial
        if done > 0 and self.step < self.total_steps:
            seconds = (time.monotonic() - self._started) / done * (self.total_steps - self.step)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        return " | ".join(parts)

    def _build_display(self) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
            speed_estimate_period=SPEED_WINDOW_SECONDS,
        )
        self._task = self._bar.add_task("training", total=self.total_steps, completed=self.step)
        self._display = Live(self._render(), console=self.console, refresh_per_second=2)

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 3), expand=False)
        for _ in range(2):
            table.add_column(style="dim")
            table.add_column(justify="right", min_width=8)
            table.add_column(justify="left", min_width=8)
        cells = [self._cells(figure) for figure in self._figures() if figure.key in self._last]
        half = (len(cells) + 1) // 2
        for left, right in zip_longest(cells[:half], cells[half:], fillvalue=()):
            table.add_row(*left, *right)
        return Group(table, self._bar) if cells else Group(self._bar)

    def _cells(self, figure: Figure) -> tuple[str, Text, Text]:
        change = self._last[figure.key] - self._first[figure.key]
        style = "dim" if not figure.better else "green" if change * figure.better > 0 else "yellow"
        value = format_number(self._last[figure.key], percent=figure.percent)
        return figure.label, Text(value, style="bold"), Text(self._change(figure), style=style)

    def _redirect_logging(self, terminal: set[Any]) -> None:
        """Point log handlers that hold the real terminal at the stream that prints above the display."""
        names = logging.root.manager.loggerDict
        loggers = [logging.root, *(item for item in names.values() if isinstance(item, logging.Logger))]
        for handler in {handler for item in loggers for handler in item.handlers}:
            if isinstance(handler, logging.StreamHandler) and handler.stream in terminal:
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr)


def _is_finite(value: Any) -> bool:
    return value is not None and not isinstance(value, str) and math.isfinite(float(value))
