"""`python -m refine_verl.report RUN_DIR [--out FILE]`: write the report of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from refine_verl.report.html import ReportError, write_report
from refine_verl.report.metrics import MetricsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 written, 2 nothing to report on (nothing is written then)."""
    parser = argparse.ArgumentParser("python -m refine_verl.report", description="Write report.html of a run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory with metrics.jsonl")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: report.html in RUN_DIR)")
    options = parser.parse_args(arguments)
    try:
        path = write_report(options.run_dir, options.out)
    except (ReportError, MetricsError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    Console().print(path, markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
