"""Runs of two workers that are stopped, killed, damaged and starved of disk, and resume as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.ports import is_loopback, listening
from reference.runs import (
    last_step,
    read_steps,
    repeatable,
    run_and_stop,
    run_to_the_end,
    toy_overrides,
    write_corpus,
)
from reference.shared import TWO_WORKERS, shared_run

from refine_verl.record.checkpoint_files import TRACKER, damage, steps_of, tracked_step

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.runs]

STEPS = 8
EVERY = ("trainer.n_gpus_per_node=2", "trainer.test_freq=1")
TWO_KEPT = ("trainer.save_freq=2", "trainer.max_actor_ckpt_to_keep=2")
assert {*EVERY, *TWO_KEPT, f"trainer.total_training_steps={STEPS}"} == {*TWO_WORKERS}
KILLER = "actor_rollout_ref.model.external_lib=reference.killer"


@dataclass(frozen=True)
class Run:
    """How a run ended, and what was there."""

    directory: Path
    code: int
    output: str
    last_step: int
    checkpoints: list[int]
    hidden: list[str]


class Runs:
    """All runs of this file, two at a time; a test waits for those it needs."""

    def __init__(self, corpus: Path, factory: pytest.TempPathFactory) -> None:
        self.corpus, self.factory = corpus, factory
        self.listening: dict[str, str] = {}
        self.pool = ThreadPoolExecutor(max_workers=2)
        self.stopped = self.pool.submit(self._stop)
        self.whole = self.pool.submit(self._whole)
        self.lost = self.pool.submit(self._lose)
        self.damaged = self.pool.submit(self._damage)
        self.full = self.pool.submit(self._fill)
        self.finished = self.pool.submit(self._finish)

    def run(self, name: str, steps: int, *more: str, **variables: str) -> Run:
        arguments = self.arguments(name, steps, *more)
        return self._ended(self.corpus / name, *run_to_the_end(arguments, self.corpus, **variables))

    def arguments(self, name: str, steps: int, *more: str) -> list[str]:
        total = f"trainer.total_training_steps={steps}"
        return toy_overrides(self.corpus, self.corpus / name, total, *EVERY, *more)

    def _ended(self, run_dir: Path, code: int, output: str) -> Run:
        hidden = sorted(path.name for path in run_dir.glob(".*"))
        return Run(run_dir, code, output, last_step(run_dir / "metrics.jsonl"), steps_of(run_dir), hidden)

    def _whole(self) -> Run:
        whole = shared_run(self.factory, "two_workers", TWO_WORKERS)
        return self._ended(whole.directory, whole.code, whole.output)

    def _stop(self) -> Run:
        """No checkpoint is due. `timeout` hands the signal to the command and then to its group, as schedulers do."""
        run_dir = self.corpus / "run"
        arguments = self.arguments("run", STEPS, "trainer.save_freq=-1")

        def ready(process: int) -> bool:
            if last_step(run_dir / "metrics.jsonl") < 1:
                return False
            self.listening = listening(process)
            return True

        ended = run_and_stop(arguments, self.corpus, ready, signal.SIGTERM, prefix=("timeout", "900"))
        return self._ended(run_dir, *ended)

    def _lose(self) -> Run:
        """The stopped run resumes and loses a worker twice: one time more than it may."""
        self.stopped.result()
        notes = self.corpus / "notes"
        notes.mkdir()
        lost = self.run("run", STEPS, *TWO_KEPT, KILLER, "trainer.max_restarts=1", DIE_AT="6,8", DIE_NOTES=str(notes))
        assert sorted(path.name for path in notes.iterdir()) == ["6", "8"]
        return lost

    def _finish(self) -> Run:
        self.lost.result()
        return self.run("run", STEPS, *TWO_KEPT, KILLER)

    def _damage(self) -> Run:
        shutil.copytree(self.whole.result().directory, self.corpus / "damaged")
        shard = self.corpus / "damaged" / f"global_step_{STEPS}" / "actor" / "model_world_size_2_rank_1.pt"
        os.truncate(shard, shard.stat().st_size // 2)
        return self.run("damaged", STEPS + 2, *TWO_KEPT)

    def _fill(self) -> Run | None:
        """A disk that has room for three checkpoints; None where no file system may be mounted."""
        disk = self.corpus / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False).returncode:
            return None
        try:
            run = self.run("disk/full", 20, "trainer.save_freq=1")
            shutil.copytree(run.directory, self.corpus / "full")
            return run
        finally:
            subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    corpus = tmp_path_factory.mktemp("faults")
    write_corpus(corpus)
    runs = Runs(corpus, tmp_path_factory)
    yield runs
    runs.pool.shutdown(wait=True, cancel_futures=True)


def ended(future: Future[Run], code: int) -> Run:
    run = future.result()
    assert run.code == code, run.output[-4000:]
    assert run.hidden == [], "work in progress was left behind"
    assert "Traceback" not in run.output, run.output[-4000:]
    return run


def what_it_measured(run: Run, upto: int = STEPS) -> dict[int, dict[str, Any]]:
    return {step: repeatable(record) for step, record in read_steps(run.directory).items() if step <= upto}


def test_sigterm_finishes_the_step_and_leaves_a_checkpoint(runs: Runs) -> None:
    run = ended(runs.stopped, 143)
    assert 1 <= run.last_step < STEPS, "the signal came too late to show anything"
    assert run.checkpoints == [run.last_step]
    folder = run.directory / f"global_step_{run.last_step}"
    assert f"SIGTERM after step {run.last_step}; the same command resumes from {folder}" in run.output
    assert not (run.directory / "model").exists()


def test_a_run_on_one_machine_listens_to_that_machine_only(runs: Runs) -> None:
    """Ray's servers, its workers, and the rendezvous of the ranks."""
    ended(runs.stopped, 143)
    found = runs.listening
    names = " ".join(found.values())
    assert len(found) > 6 and "raylet" in names and "gcs_server" in names and names.count("ray::") >= 2, found
    assert {place: name for place, name in found.items() if not is_loopback(place)} == {}
    assert not is_loopback(":: 80") and not is_loopback("0.0.0.0 80")


def test_a_lost_worker_ends_an_attempt_and_too_many_end_the_run(runs: Runs) -> None:
    """Worker 1 is killed with half a checkpoint written, of step 6 and then of step 8; worker 0 waits for it."""
    run = ended(runs.lost, 1)
    assert "Restart 1 of 1, from the last checkpoint" in run.output
    assert run.output.count("worker 1 (process ") == 2
    assert "The run ends after 1 restart(s) (trainer.max_restarts=1)" in run.output
    assert "checkpoint of step" not in run.output  # not mistaken for a full disk
    assert "Unhandled error" not in run.output  # what worker 0 raised is no news
    stopped = runs.stopped.result().last_step
    assert run.checkpoints == ([6, 4] if stopped < 5 else [6, stopped]) and tracked_step(run.directory) == 6


def test_after_all_that_the_run_is_the_one_that_nobody_disturbed(runs: Runs) -> None:
    """Stopped once, killed twice while saving: the same numbers, bit for bit, each step once."""
    whole, run = ended(runs.whole, 0), ended(runs.finished, 0)
    assert what_it_measured(run) == what_it_measured(whole)
    assert list(what_it_measured(run)) == list(range(STEPS + 1))
    assert run.checkpoints == whole.checkpoints == [8, 6]  # two are kept, whoever wrote them
    assert all(damage(run.directory / f"global_step_{step}") is None for step in run.checkpoints)
    assert (run.directory / "model" / "model.safetensors").is_file()


def test_a_damaged_checkpoint_is_passed_over(runs: Runs) -> None:
    whole, run = ended(runs.whole, 0), ended(runs.damaged, 0)
    assert "global_step_8 is damaged: actor/model_world_size_2_rank_1.pt has " in run.output
    assert f"resumes from {run.directory / 'global_step_6'} instead" in run.output
    assert what_it_measured(run) == what_it_measured(whole)
    assert run.last_step == STEPS + 2 and run.checkpoints == [10, 8]
    assert damage(run.directory / "global_step_8") is None  # written again


def test_a_full_disk_is_an_error_and_nothing_else(runs: Runs) -> None:
    if runs.full.result() is None:
        pytest.skip("a small file system cannot be mounted here")
    run = ended(runs.full, 1)
    copy = runs.corpus / "full"
    failed = run.last_step + 1
    assert failed >= 3
    full = f"error: the file system of {run.directory} is full: the checkpoint of step {failed} could not be written. "
    assert full in run.output
    assert f"GiB are free in {run.directory}" in run.output
    assert f"global_step_{failed - 1} is whole, and the same command resumes from it" in run.output
    assert run.checkpoints == list(range(failed - 1, 0, -1)) and (copy / TRACKER).read_text() == str(failed - 1)
    for step in run.checkpoints:
        folder = copy / f"global_step_{step}"
        assert damage(folder) is None
        for shard in folder.rglob("*_rank_*.pt"):
            assert torch.load(shard, weights_only=False)
    assert list(read_steps(copy)) == list(range(failed))
    # that is a run which can resume
    assert torch.load(copy / f"global_step_{failed - 1}" / "data.pt", weights_only=False)
