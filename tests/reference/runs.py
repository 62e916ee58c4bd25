"""Whole training runs as processes of their own, on a toy corpus."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import psutil
from reference.processes import Forked

ROOT = Path(__file__).parents[2]
NOT_REPEATABLE = ("timing_s/", "perf/tokens_per_second", "perf/max_memory_gb")
TIMEOUT = 600  # seconds, of a run that hangs: a busy machine needs minutes to import and start

TOY_DELTANET = (
    "model.tokenizer=bytes",
    "model.config.vocab_size=257",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.num_heads=2",
    "model.config.hidden_ratio=2",
)
"""A DeltaNet of about 50,000 parameters."""

TOY_LACT = (
    "model=tiny_lact",
    "model.tokenizer=bytes",
    "model.config.vocab_size=257",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "model.config.lact_chunk_size=16",
    "model.config.window_size=12",
    "+model.config.intermediate_size=48",
)
"""A LaCT as small, whose documents are four chunks."""

TOY_OLMO_HYBRID = (
    "model=tiny_olmo_hybrid",
    "model.tokenizer=bytes",
    "model.config.vocab_size=257",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "+model.config.layer_types=[linear_attention,full_attention]",
    "model.config.linear_key_head_dim=12",
    "model.config.linear_value_head_dim=24",
    "model.config.intermediate_size=48",
)
"""An OLMo-hybrid as small."""

TOY_QWEN3_5 = (
    "model=tiny_qwen3_5",
    "model.tokenizer=bytes",
    "model.config.vocab_size=257",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "+model.config.layer_types=[linear_attention,full_attention]",
    "model.config.head_dim=16",
    "model.config.linear_key_head_dim=16",
    "model.config.linear_value_head_dim=8",
    "model.config.intermediate_size=48",
)
"""A Qwen3.5 as small."""

TOY_EXPERTS = (
    "model=tiny_qwen3_next",
    "model.tokenizer=bytes",
    "model.config.vocab_size=257",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=2",
    "+model.config.layer_types=[linear_attention,full_attention]",
    "model.config.head_dim=16",
    "model.config.linear_key_head_dim=16",
    "model.config.linear_value_head_dim=8",
    "model.config.moe_intermediate_size=24",
    "model.config.shared_expert_intermediate_size=24",
)
"""A Qwen3-Next as small, with four experts in a layer."""

TOY = (
    "data.max_length=64",
    "data.train_batch_size=8",
    "refine.ppo_mini_batch_size=4",
    "refine.nsp.chunks=3",
    "refine.nsp.rollout_length=3",
    "refine.warmup_steps=2",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.actor.optim.lr=5e-3",
    "trainer.test_freq=3",
    "trainer.n_gpus_per_node=1",
)
"""Two warm-up steps, two optimiser steps a step."""


def write_corpus(directory: Path) -> tuple[Path, Path]:
    """A training and a validation file: the alphabet, over and over, from a random letter on.

    Every next letter follows from the one before. Validation has 7 documents of unequal length: no number of
    workers or documents per pass divides them.
    """
    rng = random.Random(0)
    files = directory / "train.jsonl", directory / "validation.jsonl"
    for file, lengths in zip(files, ([64] * 64, [40 + 3 * i for i in range(7)]), strict=True):
        starts = [rng.randrange(26) for _ in lengths]
        texts = (
            "".join(chr(97 + (start + i) % 26) for i in range(n)) for start, n in zip(starts, lengths, strict=True)
        )
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files


def toy_overrides(directory: Path, run_dir: Path, *more: str, model: tuple[str, ...] = TOY_DELTANET) -> list[str]:
    """Command-line arguments of a toy run in ``run_dir``; the corpus lies in ``directory``."""
    return [
        "recipe=quickstart",
        f"data.train_files={directory / 'train.jsonl'}",
        f"data.val_files={directory / 'validation.jsonl'}",
        f"data.cache_dir={directory / 'cache'}",
        f"trainer.default_local_dir={run_dir}",
        *model,
        *TOY,
        *more,
    ]


def environment() -> dict[str, str]:
    """Of a process that imports this checkout; idle OpenMP threads sleep."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "REFINE_RECIPES_PATH")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), kept.get("PYTHONPATH", "")])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


Process: TypeAlias = "subprocess.Popen[str] | Forked"


@contextmanager
def started(
    overrides: list[str], cwd: Path, prefix: tuple[str, ...] | None = None, **variables: str
) -> Iterator[Process]:
    """`python -m refine_verl.main OVERRIDES` with a Ray of its own; whatever is left of it is killed afterwards.

    Args:
        overrides: the arguments.
        cwd: the working directory.
        prefix: a command that starts it, such as `timeout 600`, or () to start it as users do; None: forked from a
            process that has imported everything already.
        variables: more environment variables.
    """
    # sockets lie below this directory and their paths are limited to about 100 characters
    scratch = Path(tempfile.mkdtemp(prefix="rv"))
    env = {**environment(), "RAY_TMPDIR": str(scratch), **variables}
    process: Process
    if prefix is None:
        process = Forked("refine_verl.main", overrides, env, cwd, scratch / "output")
    else:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "refine_verl.main", *overrides],
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_tree(process)
        shutil.rmtree(scratch, ignore_errors=True)


def kill_tree(process: Process) -> None:
    """SIGKILL for the driver, its process group and every process below it, Ray's workers among them."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    for child in below:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(below, timeout=20)
    if process.stdout is not None:
        process.stdout.close()
    process.wait()


def run_to_the_end(
    overrides: list[str], cwd: Path, prefix: tuple[str, ...] | None = None, **variables: str
) -> tuple[int, str]:
    """Exit code and everything that was printed; arguments as of `started`."""
    with started(overrides, cwd, prefix, **variables) as process:
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output


def run_and_kill(overrides: list[str], cwd: Path, run_dir: Path, saved: int) -> int:
    """Kill the run as soon as it has gone past the checkpoint of step ``saved``; returns its last step."""
    deadline = time.monotonic() + TIMEOUT
    tracker, metrics = run_dir / "latest_checkpointed_iteration.txt", run_dir / "metrics.jsonl"
    log = cwd / "killed.log"
    with started([*overrides], cwd) as process:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                assert process.stdout is not None
                raise AssertionError(f"the run ended before it was killed:\n{process.stdout.read()}")
            if tracker.is_file() and tracker.read_text() == str(saved) and last_step(metrics) > saved:
                break
            time.sleep(0.02)
        else:
            raise AssertionError(f"no step after {saved} within {TIMEOUT} s; see {log}")
        kill_tree(process)
    return last_step(metrics)


def run_and_stop(
    overrides: list[str],
    cwd: Path,
    ready: Callable[[int], bool],
    number: signal.Signals,
    prefix: tuple[str, ...] | None = None,
    group: bool = False,
) -> tuple[int, str]:
    """Send a signal to a process, or to its whole group, as soon as it is ready; exit code and what was printed.

    Args:
        ready: told the number of the process.
    """
    deadline = time.monotonic() + TIMEOUT
    with started(overrides, cwd, prefix) as process:
        while not ready(process.pid):
            if process.poll() is not None or time.monotonic() > deadline:
                assert process.stdout is not None
                process.kill()
                raise AssertionError(f"the run was never ready to be stopped:\n{process.stdout.read()}")
            time.sleep(0.02)
        (os.killpg if group else os.kill)(process.pid, number)
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output


def last_step(metrics: Path) -> int:
    """Step of the last complete line, -1 without one."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    return json.loads(lines[-1])["step"] if lines else -1


def read_steps(run_dir: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by step; fails if a step is there twice."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps)), steps
    return {record["step"]: record for record in records}


def repeatable(record: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics without those that depend on the machine and the moment."""
    return {name: value for name, value in record.items() if not name.startswith(NOT_REPEATABLE)}
