"""Training does what it did: short runs, step by step, against what was recorded of an earlier version.

One run for each family and phase, and one of many rollouts in the fused step, which is also killed and gone on with;
DeltaNet's is in test_old_run.py. `record.py` and `compare.py` beside it do all
scenarios, and bit for bit on one machine. Where a result is meant to change, the recordings are made again, and the
change says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from reference.runs import run_and_kill
from trajectories.held import LATER_STEPS, assert_same, recorded, run_forked, this_checkout
from trajectories.process import Done
from trajectories.record import record, versions
from trajectories.scenarios import SCENARIOS

MANY, KILLED = "many_rollouts", "many_rollouts, killed"
HELD = (MANY, "gated_deltanet_segments", "lact", "posttrain_grpo", "test_time")
RELEASES = ("torch", "transformers", "flash-linear-attention")
"""Decide what random weights a seed gives."""


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """All runs of this file, two at a time; a test waits for the one it needs."""
    now, then = versions(), recorded(HELD[0])["versions"]
    others = [f"{item} {now[item]} instead of {then[item]}" for item in RELEASES if now[item] != then[item]]
    if others:
        pytest.skip(f"the random weights may be others: {', '.join(others)}")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(max_workers=2) as pool:
        patch.setenv("PYTHONPATH", this_checkout())
        held = {item.name: item for item in SCENARIOS if item.name in HELD}
        found = {name: pool.submit(record, item, run_forked) for name, item in held.items()}
        yield found | {KILLED: pool.submit(record, held[MANY], run_killed_and_again)}
        pool.shutdown(wait=True, cancel_futures=True)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.runs
@pytest.mark.parametrize("name", HELD)
def test_a_run_does_what_it_did(runs: dict[str, Future[dict[str, Any]]], name: str) -> None:
    assert_same(runs[name].result()["run"], recorded(name)["run"])


def run_killed_and_again(module: str, arguments: Sequence[str], cwd: Path, scratch: Path) -> Done:
    """SIGKILL after the checkpoint of step 3 and one more step; then the command as it is."""
    (run_dir,) = (Path(item.partition("=")[2]) for item in arguments if item.startswith("trainer.default_local_dir="))
    endless = ["trainer.total_training_steps=50" if "total_training_steps" in item else item for item in arguments]
    assert endless != arguments and run_and_kill(endless, cwd, run_dir, saved=3) > 3
    return run_forked(module, arguments, cwd, scratch)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.runs
def test_a_killed_fused_run_goes_on_as_if_nothing_had_happened(runs: dict[str, Future[dict[str, Any]]]) -> None:
    """Bit for bit, metrics and weights."""
    whole, resumed = (runs[name].result()["run"] for name in (MANY, KILLED))
    assert [step["step"] for step in whole["steps"]] == list(range(6))
    assert resumed["steps"] == whole["steps"] and resumed["model"] == whole["model"]
    assert whole["steps"][5] != {**whole["steps"][4], "step": 5}  # the control
    tokens = [step["perf/forward_tokens_per_token"] for step in whole["steps"][1:]]
    # 64 tokens of a document are read once, three of each of its 32 rollouts are written, and two trained, twice
    assert tokens == [1, *[1 + 32 * (3 + 2 * 2) / 64] * 4]


@pytest.mark.parametrize("name", HELD)
def test_small_changes_are_seen(name: str) -> None:
    """The control of the comparison."""
    wanted = recorded(name)["run"]
    assert_same(wanted, wanted)
    for change in (change_loss, change_norm, drop_metric, drop_file, change_answer):
        other = copy.deepcopy(wanted)
        if change(other):
            with pytest.raises(AssertionError):
                assert_same(other, wanted)


def change_loss(run: dict[str, Any]) -> bool:
    run["steps"][-1]["actor/ntp_loss"] *= 1 + 2 * LATER_STEPS
    return True


def change_norm(run: dict[str, Any]) -> bool:
    if run["model"] is not None:
        run["model"]["norms"]["lm_head.weight"] *= 1 + 2 * LATER_STEPS
    return run["model"] is not None


def drop_metric(run: dict[str, Any]) -> bool:
    return run["steps"][1].pop("actor/lr") is not None


def drop_file(run: dict[str, Any]) -> bool:
    return run["files"].pop() is not None


def change_answer(run: dict[str, Any]) -> bool:
    for row in run["predictions"][:1]:
        row["prediction"] += "x"
    return bool(run["predictions"])
