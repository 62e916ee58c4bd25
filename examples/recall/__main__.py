"""Everything in one command: base models, mid-training, ablations, the noise of gradients, test-time training.

    python -m examples.recall              # five seeds: docs/results.md and its figures, under an hour on two cores
    python -m examples.recall --fast       # two seeds, fewer steps, DeltaNet only: below outputs/recall/fast
    python -m examples.recall --kinds noise,signal,bound   # these only, with the bases they need; the rest stays
    python -m examples.recall --missing    # only jobs that results.json lacks or has of other settings; the rest stays

A run that was cut resumes where it was; ``--report`` writes a page from what there is, beside the jobs unless all are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before torch: the operations of so small a model are too short to share, and jobs share the cores instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from examples.miniature.pieces import rounded
from examples.miniature.results import ROOT, assemble, project_sources
from examples.recall.arms import BATCH, LEARNING_RATES
from examples.recall.bases import MODELS, RECALL
from examples.recall.jobs import Amount, Job, all_jobs
from examples.recall.runner import fingerprint, read_record, run_all

FULL = Amount()
FAST = Amount(
    seeds=2, steps=30, ablation_steps=15, held_out=128, draws=2, noise_batch=2, bound_rollouts=16, prompts=16, passes=2
)


@dataclasses.dataclass(frozen=True)
class Example:
    """What a command runs.

    Attributes:
        name: of its folder and of its part of the page.
        models: in `MODELS`; with ``--fast`` the first of them.
        jobs: what there is to do with them.
        full, fast: how much.
        about: for ``--help``.
    """

    name: str
    models: tuple[str, ...]
    jobs: Callable[[Sequence[str], Amount], list[Job]]
    full: Amount
    fast: Amount
    about: str | None


def recall() -> Example:
    """This one."""
    return Example("recall", RECALL, all_jobs, FULL, FAST, __doc__)


def collect(records: Sequence[dict[str, Any]], amount: Amount, models: Sequence[str] = RECALL) -> dict[str, Any]:
    """The content of ``results.json``."""
    return rounded(
        {
            "amount": dataclasses.asdict(amount),
            "batch": BATCH,
            "learning_rates": LEARNING_RATES,
            "models": {name: dataclasses.asdict(MODELS[name]) for name in models},
            "date": time.strftime("%Y-%m-%d"),
            "environment": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
            "processor_minutes": sum(record["processor_seconds"] for record in records) / 60,
            "jobs": [
                {name: value for name, value in record.items() if name != "processor_seconds"} for record in records
            ],
        }
    )


def write(results: dict[str, Any], file: Path, docs: Path, name: str = "recall") -> Path:
    """``results.json`` and the page; other examples' sections come along where the page is the project's."""
    file.write_text(json.dumps(results, separators=(",", ":")).replace('{"kind"', '\n{"kind"') + "\n")
    sources = project_sources() if docs == ROOT / "docs" else {}
    return assemble({**sources, name: file}, docs)


def arguments(example: Example, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{example.name}",
        description=example.about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--fast", action="store_true", help="fewer seeds and steps, one model")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write the page from finished jobs, into --out unless all are; run nothing",
    )
    parser.add_argument("--kinds", help="jobs of these kinds only, by commas: signal,bound,noise")
    parser.add_argument(
        "--missing", action="store_true", help="only jobs that results.json lacks, or has of other settings"
    )
    parser.add_argument("--seeds", type=int, help="instead of the default")
    parser.add_argument("--processes", type=int, default=2, help="jobs at a time, one thread each (default: 2)")
    parser.add_argument("--out", type=Path, help="where finished jobs are kept (default: outputs/EXAMPLE/full or fast)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, example: Example | None = None) -> None:
    example = example or recall()
    options = arguments(example, argv)
    amount = example.fast if options.fast else example.full
    out = options.out or Path("outputs") / example.name / ("fast" if options.fast else "full")
    amount = dataclasses.replace(amount, seeds=options.seeds or amount.seeds)
    kinds = options.kinds.split(",") if options.kinds else None
    every = example.jobs(example.models[: 1 if options.fast else None], amount)
    file, docs = destination(out, not options.fast, example.name)
    known = json.loads(file.read_text()) if file.is_file() and (kinds or options.missing) else None
    wanted = chosen(every, kinds)
    if options.missing:
        wanted = missing(wanted, amount, known)
    jobs = with_bases(wanted, every)
    started = time.monotonic()
    if options.report:
        records = [record for job in jobs if (record := read_record(job, amount, out)) is not None]
        print(f"{len(records)} of {len(jobs)} jobs are there")
        if not records:
            raise SystemExit(f"error: no finished jobs below {out}. Leave out --report to run them, or name --out DIR.")
    else:
        records = run_all(jobs, amount, out, options.processes)
    if len(records) < len(jobs):
        (file, docs), known = destination(out, False, example.name), None
    results = collect(records, amount, example.models)
    if known is not None:
        results = added_to(known, results, [job.name for job in wanted], kinds if kinds and not options.missing else ())
    print(f"{write(results, file, docs, example.name)} after {(time.monotonic() - started) / 60:.1f} minutes")


def chosen(jobs: Sequence[Job], kinds: Sequence[str] | None) -> list[Job]:
    """Jobs of these kinds (None: all).

    Raises:
        SystemExit: a kind that no job has.
    """
    if kinds is None:
        return list(jobs)
    known = sorted({job.kind for job in jobs})
    if unknown := sorted(set(kinds) - set(known)):
        raise SystemExit(
            f"error: --kinds: there are no jobs of the kind {', '.join(unknown)}. Known: {', '.join(known)}."
        )
    return [job for job in jobs if job.kind in kinds]


def missing(jobs: Sequence[Job], amount: Amount, known: Mapping[str, Any] | None) -> list[Job]:
    """Those of ``jobs`` that the results ``known`` lack, or have of other settings.

    Raises:
        SystemExit: there are none.
    """
    have = {} if known is None else {name_of(record): record.get("fingerprint") for record in known["jobs"]}
    found = [job for job in jobs if have.get(job.name) != fingerprint(job, amount)]
    if not found:
        raise SystemExit("error: --missing: results.json has all jobs, of these settings. Leave it out to run all.")
    return found


def with_bases(wanted: Sequence[Job], every: Sequence[Job]) -> list[Job]:
    """With the base models that they start from, which are not kept and are trained anew."""
    needed, names = {(job.model, job.seed) for job in wanted}, {job.name for job in wanted}
    return [job for job in every if job.name in names or job.kind == "base" and (job.model, job.seed) in needed]


def name_of(record: Mapping[str, Any]) -> str:
    """Of the job that a record in ``results.json`` is of."""
    return Job(record["kind"], record["model"], record["seed"], record["state"], record["what"]).name


def added_to(
    known: dict[str, Any], new: dict[str, Any], names: Sequence[str], kinds: Sequence[str] = ()
) -> dict[str, Any]:
    """Results of a whole run with the jobs called ``names`` in place of those they had; the page says when these ran.

    Of ``kinds`` no other jobs than these are left.
    """
    wanted = [job for job in new["jobs"] if name_of(job) in names]
    stay = [job for job in known["jobs"] if name_of(job) not in names and job["kind"] not in kinds]
    later = {
        "jobs": [name_of(job) for job in wanted],
        "date": new["date"],
        "processor_minutes": new["processor_minutes"],
        "torch": new["environment"]["torch"],
    }
    kept = {name_of(job) for job in stay}
    earlier = [{**run, "jobs": [name for name in run["jobs"] if name in kept]} for run in known.get("later", [])]
    return {
        **known,
        "amount": {**new["amount"], "seeds": known["amount"]["seeds"]},
        "jobs": [*stay, *wanted],
        "later": [*(run for run in earlier if run["jobs"]), later],
    }


def destination(out: Path, whole: bool, name: str = "recall") -> tuple[Path, Path]:
    """Where ``results.json`` and the page go: the project's own are for a whole full run only."""
    return (ROOT / f"examples/{name}/results.json", ROOT / "docs") if whole else (out / "results.json", out)


if __name__ == "__main__":
    main()
