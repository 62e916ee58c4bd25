"""A run directory of an earlier version is gone on from: its checkpoint, its metrics, its configuration.

The directory was left after step 2 of a run of the smallest model; recorded are the four steps of the same run without
an interruption.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from trajectories.held import assert_same, recorded, run_forked, this_checkout
from trajectories.record import resume_old_run
from trajectories.scenarios import unpack_old_run

DONE = 3
"""Lines of metrics that are there: the validation before the first step, and two steps."""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.runs
def test_an_old_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", this_checkout())
    unpack_old_run(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_text().splitlines()
    assert len(before) == DONE
    found = resume_old_run(tmp_path, run_forked)["run"]
    assert metrics.read_text().splitlines()[:DONE] == before, "times and all: they were not done again"
    assert_same(found, recorded("old_run")["run"])
