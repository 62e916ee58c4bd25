"""`python -m refine_verl.report RUN [RUN ...]`: the report of a run, or one page that compares several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from refine_verl.record.metrics import MetricsError
from refine_verl.report.compare import AXES, COMPARISON_FILE, write_comparison
from refine_verl.report.html import ReportError, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 written, 2 nothing to report on (nothing is written then)."""
    about = "Write report.html of a run, or one page that compares several runs."
    parser = argparse.ArgumentParser("python -m refine_verl.report", description=about)
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", help="run directory with metrics.jsonl")
    where = f"(default: report.html in RUN; of several runs {COMPARISON_FILE} here)"
    parser.add_argument("--out", metavar="FILE", help=f"file to write {where}")
    parser.add_argument("--x", choices=AXES, help="what several runs are drawn over (default: step)")
    options = parser.parse_args(arguments)
    try:
        if len(options.run_dirs) > 1:
            path = write_comparison(options.run_dirs, options.out, options.x or "step")
        elif options.x is not None:
            parser.error("--x is for several runs: the report of one run is by step")
        else:
            path = write_report(options.run_dirs[0], options.out)
    except (ReportError, MetricsError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    Console().print(path, markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
