"""A run that several files only read, made once by whoever comes first, in whichever process of the suite."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from reference.runs import run_to_the_end, toy_overrides, write_corpus

TWO_WORKERS = (
    "trainer.total_training_steps=8",
    "trainer.n_gpus_per_node=2",
    "trainer.test_freq=1",
    "trainer.save_freq=2",
    "trainer.max_actor_ckpt_to_keep=2",
)
"""Of the shared run `two_workers`."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended, whose directory is left as it is."""

    directory: Path
    code: int
    output: str


def shared_run(factory: pytest.TempPathFactory, name: str, overrides: Sequence[str]) -> Finished:
    """The toy run of that name and these overrides; the corpus lies in the parent of its directory."""
    base = factory.getbasetemp()
    # each process of pytest-xdist has a directory of its own below that of the session
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
    directory.mkdir(parents=True, exist_ok=True)
    result = directory / "result.json"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.is_file():
            write_corpus(directory)
            code, output = run_to_the_end(toy_overrides(directory, directory / "run", *overrides), directory)
            result.write_text(json.dumps({"overrides": list(overrides), "code": code, "output": output}))
    found = json.loads(result.read_text())
    assert found["overrides"] == list(overrides), f"two runs are called {name}"
    return Finished(directory / "run", found["code"], found["output"])
