"""Post-training and test-time training through the command line, Ray and FSDP2: files, resuming, refusals."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from reference.prompt_runs import TEST, prompt_overrides, write_prompts
from reference.runs import last_step, read_steps, repeatable, run_and_stop, run_to_the_end
from safetensors.torch import load_file

from refine_verl.main import main
from refine_verl.models.pieces import piece_count
from refine_verl.trainer import launch

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.runs]

MANY = (
    "refine.nsp.reward=hybrid",
    "refine.nsp.credit=token",
    "refine.nsp.group=position",
    "refine.nsp.rollouts_per_position=3",
    "refine.nsp.rollouts_together=4",
    "refine.nsp.rollout_length={min:1,max:3,by:entropy}",
)
"""Credit per token of rollouts of unequal lengths, which are written and trained in pieces. The recipe's binary reward
is 0 with random weights."""
TTT = (
    *MANY,
    "data.train_batch_size=3",
    "refine.ppo_mini_batch_size=3",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
)
FUSED = "refine.on_policy=true"
GRPO = ("refine.outer=grpo", "refine.answers.samples=3", FUSED)
ONLINE = (*TTT, "refine.ttt.reset=none", "trainer.save_freq=1", FUSED)


def read_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]


class Runs:
    """All runs of this file, two at a time; a test waits for those it needs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        pool = self.pool = ThreadPoolExecutor(max_workers=2)
        whole = ("trainer.total_training_steps=4", "trainer.save_freq=4")
        self.posttrain = pool.submit(self.run, "posttrain", "whole", *GRPO, *whole)
        self.ttt = pool.submit(self.run, "ttt", "ttt", *TTT)
        self.posttrain_resumed = pool.submit(self._resumed_posttrain)
        self.online = pool.submit(self.run, "ttt", "online", *ONLINE)
        self.ttt_resumed = pool.submit(self._resumed_ttt)
        self.online_resumed = pool.submit(self._resumed_online)

    def run(self, recipe: str, name: str, *more: str) -> Path:
        run_dir = self.directory / name
        code, output = run_to_the_end(prompt_overrides(recipe, self.directory, run_dir, *more), self.directory)
        assert code == 0, output[-4000:]
        return run_dir

    def _resumed_posttrain(self) -> Path:
        """Interrupted from the keyboard: the terminal sends SIGINT to Ray's processes, too."""
        whole = (*GRPO, "trainer.total_training_steps=4", "trainer.save_freq=4")
        run_dir = self.directory / "resumed"
        arguments = prompt_overrides("posttrain", self.directory, run_dir, *whole)
        metrics = run_dir / "metrics.jsonl"
        # after step 0, the validation, there is a moment in which a signal ends the run at once
        code, output = run_and_stop(
            arguments, self.directory, lambda _: last_step(metrics) >= 1, signal.SIGINT, group=True
        )
        step = last_step(metrics)
        assert code == 130 and f"stopped by SIGINT after step {step}" in output, output[-4000:]
        assert 1 <= step < 4 and (run_dir / "latest_checkpointed_iteration.txt").read_text() == str(step)
        return self.run("posttrain", "resumed", *whole)

    def _interrupted(self, whole: Future[Path], name: str, kept: int) -> Path:
        """As a kill leaves it: some whole lines and the beginning of one."""
        copy = shutil.copytree(whole.result(), self.directory / name)
        lines = (copy / "predictions.jsonl").read_text().splitlines(keepends=True)
        (copy / "predictions.jsonl").write_text("".join(lines[:kept]) + lines[kept][:20])
        return copy

    def _resumed_ttt(self) -> Path:
        """Stopped after the first batch or the second; then as a kill leaves it, one row into the second batch."""
        run_dir = self.directory / "ttt_resumed"
        predictions = run_dir / "predictions.jsonl"
        code, output = run_and_stop(
            prompt_overrides("ttt", self.directory, run_dir, *TTT),
            self.directory,
            lambda _: predictions.is_file() and predictions.stat().st_size > 0,
            signal.SIGTERM,
        )
        assert code == 143 and "the same command resumes behind the last answer" in output, output[-4000:]
        lines = predictions.read_text().splitlines(keepends=True)
        assert (
            len(lines) in (3, 6)
            and lines
            == self.ttt.result().joinpath(predictions.name).read_text().splitlines(keepends=True)[: len(lines)]
        )
        assert not (run_dir / "latest_checkpointed_iteration.txt").exists()  # weights are those it began with
        if len(lines) > 4:
            predictions.write_text("".join(lines[:4]) + lines[4][:20])
        return self.run("ttt", "ttt_resumed", *TTT)

    def _resumed_online(self) -> Path:
        copy = self._interrupted(self.online, "online_resumed", kept=5)
        (copy / "latest_checkpointed_iteration.txt").write_text("1")
        shutil.rmtree(copy / "model")  # of the run that was copied
        return self.run("ttt", "online_resumed", *ONLINE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    directory = tmp_path_factory.mktemp("prompt_runs")
    write_prompts(directory)
    runs = Runs(directory)
    yield runs
    runs.pool.shutdown(wait=True, cancel_futures=True)


def without_moment(steps: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {step: repeatable(record) for step, record in steps.items()}


def test_post_training_resumes_exactly(runs: Runs) -> None:
    """Metrics of all steps, answers of all validations, GRPO's sampled answers among what they depend on."""
    whole, resumed = runs.posttrain.result(), runs.posttrain_resumed.result()
    steps = read_steps(whole)
    assert sorted(steps) == [0, 1, 2, 3, 4]
    assert without_moment(steps) == without_moment(read_steps(resumed))
    assert read_rows(whole) == read_rows(resumed)
    assert {row["step"] for row in read_rows(whole)} == {0, 2, 4} and len(read_rows(whole)) == 3 * TEST
    assert (whole / "model" / "model.safetensors").is_file()


def test_prompts_are_read_in_the_pass_that_is_trained(runs: Runs) -> None:
    """`refine.on_policy`, in post-training's inner loop and online; the control: test-time training in two phases."""
    for run, fused in ((runs.posttrain, True), (runs.online, True), (runs.ttt, False)):
        for step, record in read_steps(run.result()).items():
            assert step == 0 or ("timing_s/rollout" not in record and record["nsp/reward/std"] > 0) == fused, step


def test_every_validation_row_is_answered_and_averaged(runs: Runs) -> None:
    whole = runs.posttrain.result()
    steps, rows = read_steps(whole), read_rows(whole)
    for step in (0, 2, 4):
        scores = [row["scores"]["substring_match"] for row in rows if row["step"] == step]
        assert len({row["id"] for row in rows if row["step"] == step}) == TEST
        assert steps[step]["val/ruler_squadqa/substring_match"] == pytest.approx(sum(scores) / TEST)
    assert "val/ruler_squadqa/substring_match" not in steps[1]


def test_test_time_training_answers_every_prompt_twice(runs: Runs) -> None:
    run = runs.ttt.result()
    rows, steps = read_rows(run), read_steps(run)
    assert len(rows) == len({row["id"] for row in rows}) == TEST and [row["batch"] for row in rows] == [1] * 3 + [
        2
    ] * 3 + [3]
    for row in rows:
        assert {"prediction", "prediction_before", "references", "scores", "scores_before", "task"} <= row.keys()
        assert [set(point) for point in row["adaptation"]] == [{"step", "loss", "reward"}, {"step", "loss"}]
    assert sorted(steps) == [1, 2, 3]
    for key, name in (("scores", "substring_match"), ("scores_before", "before/substring_match")):
        mean = sum(row[key]["substring_match"] for row in rows) / TEST
        assert steps[3][f"val/ruler_squadqa/{name}"] == pytest.approx(mean)
    assert "ruler_squadqa/before" in (run / "report.html").read_text()
    assert not (run / "model").exists()  # nothing was trained that outlives the run


def test_rollouts_come_in_pieces_and_end_where_the_text_is_predictable(runs: Runs) -> None:
    """What the runs that resume below have to do again to the bit."""
    settings = dict(item.removeprefix("refine.nsp.").split("=", 1) for item in MANY)
    config = OmegaConf.load(runs.ttt.result() / "config.yaml").refine.nsp
    rollouts = (config.chunks, config.rollouts_per_position)
    assert config.credit == settings["credit"] == "token"
    assert piece_count(*rollouts, int(settings["rollouts_together"])) > 1
    for run in (runs.ttt, runs.online):
        lengths = [record["nsp/rollout_length/mean"] for record in read_steps(run.result()).values()]
        assert all(1 < length < 3 for length in lengths) and len(set(lengths)) > 1


def test_test_time_training_goes_on_behind_the_last_answer(runs: Runs) -> None:
    whole, resumed = read_rows(runs.ttt.result()), read_rows(runs.ttt_resumed.result())
    assert resumed == whole
    assert without_moment(read_steps(runs.ttt.result())) == without_moment(read_steps(runs.ttt_resumed.result()))


def test_online_adaptation_resumes_from_its_checkpoint(runs: Runs) -> None:
    whole, resumed = runs.online.result(), runs.online_resumed.result()
    assert read_rows(whole) == read_rows(resumed)
    assert [row["id"] for row in read_rows(whole)] == [f"test_prompts.jsonl:{row}" for row in range(TEST)]
    assert without_moment(read_steps(whole)) == without_moment(read_steps(resumed))
    weights, again = (load_file(run / "model" / "model.safetensors") for run in (whole, resumed))
    assert weights.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in weights.items())


def test_answers_of_other_settings_are_not_mixed(
    runs: Runs, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "train", lambda *_: pytest.fail("Ray would have been started"))
    run = runs.ttt.result()
    before = (run / "predictions.jsonl").read_bytes()
    assert main(prompt_overrides("ttt", runs.directory, run, *TTT, "refine.loss.rl_coef=0.5")) == 2
    said = capfd.readouterr().err
    assert "refine.loss.rl_coef: 0.4 -> 0.5" in said and "resume_mode=disable" in said
    assert main(prompt_overrides("posttrain", runs.directory, run)) == 2
    assert "holds a run of refine.phase=ttt" in capfd.readouterr().err
    assert (run / "predictions.jsonl").read_bytes() == before
