"""Everything in one command: base models, mid-training, ablations, the noise of gradients, test-time training.

    python -m examples.recall              # five seeds: docs/results.md and its figures, under an hour on two cores
    python -m examples.recall --fast       # two seeds, fewer steps, DeltaNet only: below outputs/recall/fast

A run that was cut resumes where it was; ``--report`` writes a page from what there is, beside the jobs unless all are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch: the operations of so small a model are too short to share, and jobs share the cores instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from examples.miniature.results import ROOT, assemble, project_sources
from examples.recall.arms import BATCH, LEARNING_RATES
from examples.recall.bases import MODELS
from examples.recall.jobs import Amount, Job, all_jobs
from examples.recall.runner import read_record, rounded, run_all

FULL = Amount()
FAST = Amount(seeds=2, steps=30, ablation_steps=15, held_out=128, draws=4, prompts=16, passes=2)


def collect(records: Sequence[dict[str, Any]], amount: Amount) -> dict[str, Any]:
    """The content of ``results.json``."""
    return rounded(
        {
            "amount": dataclasses.asdict(amount),
            "batch": BATCH,
            "learning_rates": LEARNING_RATES,
            "models": {name: dataclasses.asdict(spec) for name, spec in MODELS.items()},
            "date": time.strftime("%Y-%m-%d"),
            "environment": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
            "processor_minutes": sum(record["processor_seconds"] for record in records) / 60,
            "jobs": [
                {name: value for name, value in record.items() if name not in ("fingerprint", "processor_seconds")}
                for record in records
            ],
        }
    )


def write(results: dict[str, Any], file: Path, docs: Path) -> Path:
    """``results.json`` and the page; other examples' sections come along where the page is the project's."""
    file.write_text(json.dumps(results, separators=(",", ":")).replace('{"kind"', '\n{"kind"') + "\n")
    sources = project_sources() if docs == ROOT / "docs" else {}
    return assemble({**sources, "recall": file}, docs)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.recall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="in about five minutes: fewer seeds and steps, one model")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write the page from finished jobs, into --out unless all are; run nothing",
    )
    parser.add_argument("--processes", type=int, default=2, help="jobs at a time, one thread each (default: 2)")
    parser.add_argument("--out", type=Path, help="where finished jobs are kept (default: outputs/recall/full or fast)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    amount = FAST if options.fast else FULL
    out = options.out or Path("outputs/recall") / ("fast" if options.fast else "full")
    jobs: list[Job] = all_jobs(["deltanet"] if options.fast else list(MODELS), amount)
    started = time.monotonic()
    if options.report:
        records = [record for job in jobs if (record := read_record(job, amount, out)) is not None]
        print(f"{len(records)} of {len(jobs)} jobs are there")
        if not records:
            raise SystemExit(f"error: no finished jobs below {out}. Leave out --report to run them, or name --out DIR.")
    else:
        records = run_all(jobs, amount, out, options.processes)
    file, docs = destination(out, whole=not options.fast and len(records) == len(jobs))
    print(f"{write(collect(records, amount), file, docs)} after {(time.monotonic() - started) / 60:.1f} minutes")


def destination(out: Path, whole: bool) -> tuple[Path, Path]:
    """Where ``results.json`` and the page go: the project's own are for a whole full run only."""
    return (ROOT / "examples/recall/results.json", ROOT / "docs") if whole else (out / "results.json", out)


if __name__ == "__main__":
    main()
