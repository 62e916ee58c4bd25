"""Runs the jobs in several processes; every finished one is a file, so that a run that was cut resumes where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from examples.miniature.pieces import rounded
from examples.recall.arms import BATCH, LEARNING_RATES
from examples.recall.bases import MODELS
from examples.recall.jobs import ARMS, COMPARED, Amount, Job, run_job
from refine_verl.record.files import replacing, write_atomically


def fingerprint(job: Job, amount: Amount) -> str:
    """Of all that decides about a job's numbers; a file with another one is not reused."""
    parts: list[Any] = [dataclasses.asdict(job), dataclasses.asdict(MODELS[job.model])]
    if job.kind == "base":
        parts.append(amount.shrink)  # what follows does not change it
    else:
        # more seeds leave those that are there as they are
        parts += [{**dataclasses.asdict(amount), "seeds": 0}, BATCH, LEARNING_RATES, repr(ARMS.get(job.what))]
    parts += [repr(arm) for arm in COMPARED.get(job.kind, ())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def run_all(jobs: Sequence[Job], amount: Amount, out: Path, processes: int) -> list[dict[str, Any]]:
    """Run what is not there yet; returns the records of all jobs that are.

    Args:
        jobs: bases first; a job waits for its base.
        amount: how much each does.
        out: directory of the records (``jobs/*.json``) and of the bases' weights.
        processes: at a time, with one thread each.

    Raises:
        ValueError: a job without its base.
        Exception: that of the first job that failed, after those under way have been kept.
    """
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    started, todo = time.monotonic(), [job for job in jobs if read_record(job, amount, out) is None]
    waiting, running = list(todo), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare) as pool:
        done = 0
        while waiting or running:
            for job in _ready(waiting, amount, out)[: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(_run, job, amount, out)] = job
            if not running:
                raise ValueError(f"no base model for {waiting[0].name}: its job is not among these")
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                done += 1
                _report(future, running.pop(future), done, len(todo), time.monotonic() - started)
    return [record for job in jobs if (record := read_record(job, amount, out)) is not None]


def _ready(waiting: Sequence[Job], amount: Amount, out: Path) -> list[Job]:
    return [job for job in waiting if job.kind == "base" or read_record(_base_of(job), amount, out) is not None]


def _base_of(job: Job) -> Job:
    return Job("base", job.model, job.seed)


def _prepare() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # random weights are the point here


def _run(job: Job, amount: Amount, out: Path) -> float:
    """In the process of a job: do it and keep its record. Returns its processor seconds."""
    started, used = time.monotonic(), time.process_time()
    weights = {} if job.kind == "base" else torch.load(_weights_file(_base_of(job), out), weights_only=True)
    result = run_job(job, amount, weights)
    if job.kind == "base":
        with replacing(_weights_file(job, out)) as path:
            torch.save(result.pop("weights"), path)
    record = {
        **dataclasses.asdict(job),
        "fingerprint": fingerprint(job, amount),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.monotonic() - started, 2),
        "processor_seconds": round(time.process_time() - used, 2),
        "result": result,
    }
    write_atomically(_record_file(job, out), json.dumps(rounded(record)) + "\n")
    return time.process_time() - used


def _report(future: Future[float], job: Job, done: int, total: int, seconds: float) -> None:
    used = future.result()
    print(f"[{seconds / 60:5.1f} min] {done}/{total} {job.name} ({used:.0f} s)", flush=True)


def read_record(job: Job, amount: Amount, out: Path) -> dict[str, Any] | None:
    """The record of a finished job; None where there is none with these settings."""
    try:
        record: dict[str, Any] = json.loads(_record_file(job, out).read_text())
    except (OSError, ValueError):
        return None
    whole = job.kind != "base" or _weights_file(job, out).is_file()
    return record if whole and record.get("fingerprint") == fingerprint(job, amount) else None


def _record_file(job: Job, out: Path) -> Path:
    return out / "jobs" / f"{job.name}.json"


def _weights_file(job: Job, out: Path) -> Path:
    return out / "jobs" / f"{job.name}.pt"
