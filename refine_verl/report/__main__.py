"""`python -m refine_verl.report RUN [RUN ...]`: the report of a run, or one page that compares several."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import ClassVar

from refine_verl.command.front import run_command, show
from refine_verl.command.keys import list_keys, read_keys
from refine_verl.config import ConfigError, Settings, option
from refine_verl.report.compare import AXES, COMPARISON_FILE, write_comparison
from refine_verl.report.html import write_report

USAGE = """\
python -m refine_verl.report RUN [RUN ...] [--out FILE] [--x AXIS]

Writes report.html of a run, or one page that compares several. RUN is a run directory with metrics.jsonl.

"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """Where the page goes, and what its curves are drawn over."""

    SECTION: ClassVar[str] = "report"

    out: str | None = option(
        None, f"file to write; null: report.html in RUN, or {COMPARISON_FILE} here for several runs"
    )
    x: str | None = option(None, "what several runs are drawn over; null: step", choices=tuple(AXES))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(arguments, help=lambda _: USAGE + list_keys(ReportSettings), run=_run)


def _run(arguments: list[str]) -> None:
    settings, runs = read_keys(arguments, ReportSettings, words=True)
    if not runs:
        raise ConfigError("", "no run given: python -m refine_verl.report RUN [RUN ...].")
    if len(runs) > 1:
        show(str(write_comparison(runs, settings.out, settings.x or "step")))
    elif settings.x is not None:
        raise ConfigError("", "--x is for several runs: the report of one run is by step.")
    else:
        show(str(write_report(runs[0], settings.out)))


if __name__ == "__main__":
    sys.exit(main())
