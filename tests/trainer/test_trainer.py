"""The driver's decisions, with a worker group that only remembers what it was asked."""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from reference.runs import toy_overrides
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from refine_verl.compose.composition import compose_config, register_configs
from refine_verl.compose.validate import validate
from refine_verl.record.metrics import read_metrics
from refine_verl.trainer.refine_trainer import (
    MAX_SKIPPED_UPDATES,
    RefineTrainer,
    TrainingDiverged,
    mini_batch_order,
)
from refine_verl.trainer.signals import Stopped, StopSignals
from refine_verl.workers.objective import Objective

Make = Callable[..., RefineTrainer]


@functools.cache
def resolved(*more: str) -> DictConfig:
    """Nothing is read or written at these paths."""
    register_configs()
    return validate(compose_config(toy_overrides(Path("toy"), Path("toy/run"), *more))).config


class FakeGroup:
    """Two workers that return made-up numbers and keep every message."""

    world_size = 2

    def __init__(self, grad_norms: list[float]) -> None:
        self.grad_norms = grad_norms
        self.calls: list[tuple[str, TensorDict]] = []
        self.exported: list[str] = []

    def export(self, directory: str) -> None:
        self.exported.append(directory)

    def score(self, data: TensorDict) -> Any:
        """Row b has a loss of b + 1 per predicted token and one right answer."""
        self.calls.append(("score", data.clone()))
        assert len(data) % self.world_size == 0
        rows = torch.arange(1.0, len(data) + 1, dtype=torch.float64)
        tensors = {"loss": rows * (data["lengths"] - 1), "correct": torch.ones(len(data), dtype=torch.int64)}
        return SimpleNamespace(get=lambda: tu.get_tensordict(tensor_dict=tensors))

    def rollout_and_reward(self, data: TensorDict) -> Any:
        self.calls.append(("rollout_and_reward", data.clone()))
        rows, generator = len(data), torch.Generator().manual_seed(0)
        tensors = {
            "positions": torch.arange(rows * 3).view(rows, 3),
            "rollout_tokens": torch.zeros(rows, 3, 1, 3, dtype=torch.int64),
            "old_log_probs": torch.zeros(rows, 3, 1, 3),
            "entropy_mean": torch.ones(rows),
            "entropy_selected": torch.ones(rows, 3),
            "forward_tokens": torch.full((rows,), 10),
            "reward_seconds": torch.zeros(rows),
        }
        for name in ("rewards", "reward_cosine", "reward_binary"):
            tensors[name] = torch.rand(rows, 3, 1, generator=generator)
        self.rewards = tensors["rewards"]
        return SimpleNamespace(get=lambda: tu.get_tensordict(tensor_dict=tensors))

    def update(self, data: TensorDict) -> Any:
        self.calls.append(("update", data.clone()))
        metrics = {
            "actor/ntp_loss": [2.0 if math.isfinite(norm) else math.nan for norm in self.grad_norms],
            "grad_norm": self.grad_norms,
            "lr": [0.1],
            "perf/max_memory_allocated_gb": [1.0, 3.0],
            "forward_tokens": [100],
        }
        return SimpleNamespace(get=lambda: tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics}))


def columns(rows: int) -> dict[str, np.ndarray]:
    documents = np.empty(rows, dtype=object)
    for b in range(rows):
        documents[b] = np.arange(20 + b)
    return {"input_ids": documents, "document_id": np.arange(rows, dtype=object)}


@pytest.fixture
def make() -> Make:
    def build(*more: str, grad_norms: tuple[float, ...] = (1.0, 3.0), rows: int = 8) -> RefineTrainer:
        trainer = RefineTrainer(copy.deepcopy(resolved(*more)))
        trainer.actor_rollout_wg = FakeGroup(list(grad_norms))
        trainer.train_dataloader, trainer.train_dataloader_it = [columns(rows)], None
        trainer.global_steps, trainer.total_training_steps = 3, 10
        return trainer

    return build


def test_a_step_sends_documents_then_rollouts_with_their_advantages(make: Make) -> None:
    trainer = make()
    metrics: dict[str, float] = {}
    tokens = trainer.step(metrics, {})
    group = trainer.actor_rollout_wg
    (first, documents), (second, update) = group.calls
    assert (first, second) == ("rollout_and_reward", "update")
    assert tokens == documents["lengths"].sum() == sum(range(20, 28))
    assert tu.get_non_tensor_data(documents, "global_step", None) == 3
    # the rows are reordered together: each update row still has its own position, and its group's advantage
    order = update["document_id"].tolist()
    assert order == mini_batch_order(8, 4, 2)
    assert update["positions"].tolist() == torch.arange(24).view(8, 3)[order].tolist()
    rewards = group.rewards.flatten(1)
    wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    advantages = update["advantages"].flatten(1, 2)
    torch.testing.assert_close(advantages, wanted[order][..., None].expand_as(advantages), rtol=1e-5, atol=1e-6)
    assert tu.get_non_tensor_data(update, "mini_batch_size", None) == 4
    assert metrics["perf/forward_tokens_per_token"] == (8 * 10 + 100) / tokens
    assert metrics["nsp/reward/mean"] == pytest.approx(rewards.mean().item())
    assert metrics["actor/grad_norm"] == 2.0 and metrics["perf/max_memory_gb"] == 3.0


@pytest.mark.parametrize(("step", "rolls_out"), [(1, False), (2, False), (3, True)])
def test_warm_up_steps_make_no_rollouts(make: Make, step: int, rolls_out: bool) -> None:
    trainer = make("refine.warmup_steps=2")
    trainer.global_steps = step
    metrics: dict[str, float] = {}
    trainer.step(metrics, {})
    names = [name for name, _ in trainer.actor_rollout_wg.calls]
    assert names == (["rollout_and_reward", "update"] if rolls_out else ["update"])
    objective = Objective.of(trainer.actor_rollout_wg.calls[-1][1])
    assert objective is (Objective.ROLLOUTS if rolls_out else Objective.DOCUMENTS)
    assert ("nsp/reward/mean" in metrics) == rolls_out


def test_the_baseline_never_rolls_out(make: Make) -> None:
    trainer = make("refine.loss.rl_coef=0", "refine.warmup_steps=0")
    metrics: dict[str, float] = {}
    trainer.step(metrics, {})
    assert [name for name, _ in trainer.actor_rollout_wg.calls] == ["update"]


def test_a_skipped_update_is_counted_logged_and_left_out_of_the_means(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(grad_norms=(math.nan, 3.0))
    metrics: dict[str, float] = {}
    with caplog.at_level(logging.WARNING, logger="refine_verl"):
        trainer.step(metrics, {})
    assert metrics["actor/skipped_updates"] == 1
    assert metrics["actor/grad_norm"] == 3.0 and metrics["actor/ntp_loss"] == 2.0
    assert "step 3: 1 of 2 updates skipped" in caplog.text
    assert trainer.skipped_in_a_row == 0


@pytest.mark.parametrize(
    ("norms", "stops"),
    [
        ((math.nan,) * 4, False),
        ((math.nan,) * 5, True),
        ((math.inf, math.nan) * 3, True),
        ((math.nan,) * 4 + (1.0,) + (math.nan,) * 4, False),
        ((math.nan,) * 5 + (1.0,), True),
        ((1.0,) * 8, False),
    ],
)
@pytest.mark.parametrize("saved", [False, True], ids=["unsaved", "saved"])
def test_five_bad_updates_in_a_row_save_and_stop(
    make: Make, monkeypatch: pytest.MonkeyPatch, norms: tuple[float, ...], stops: bool, saved: bool
) -> None:
    trainer, written = make(), []
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda: written.append(trainer.global_steps))
    for norm in norms:  # one by one: the count goes on from step to step
        trainer.actor_rollout_wg.grad_norms = [norm]
        trainer.step({}, {})
    if not stops:
        trainer._stop_if_diverged(saved=saved)
        assert written == []
        return
    with pytest.raises(TrainingDiverged) as error:
        trainer._stop_if_diverged(saved=saved)
    said = str(error.value)
    assert f"{trainer.run_dir}/global_step_3" in said and "actor_rollout_ref.actor.optim.lr" in said
    assert f"{MAX_SKIPPED_UPDATES} updates in a row" in said
    assert written == ([] if saved else [3])


@pytest.mark.parametrize(("norms", "ends"), [((math.nan, math.inf), True), ((math.nan, 1.0), False), ((), False)])
def test_a_run_without_one_update_is_no_success(make: Make, norms: tuple[float, ...], ends: bool) -> None:
    trainer = make()
    for norm in norms:
        trainer.actor_rollout_wg.grad_norms = [norm]
        trainer.step({}, {})
    if not ends:
        trainer._refuse_to_have_learnt_nothing()
        return
    with pytest.raises(TrainingDiverged, match="all 2 updates had a NaN or infinite gradient"):
        trainer._refuse_to_have_learnt_nothing()


def test_due_steps(make: Make) -> None:
    trainer = make()
    due = {}
    for frequency in (-1, 0, 4):
        due[frequency] = []
        for trainer.global_steps in range(1, 11):
            if trainer._is_due(frequency):
                due[frequency].append(trainer.global_steps)
    assert due == {-1: [], 0: [], 4: [4, 8, 10]}


def test_a_used_up_data_loader_starts_again(make: Make) -> None:
    """Also right after a checkpoint written at the end of an epoch: its iterator is empty from the start."""
    trainer = make()

    def batch() -> TensorDict:
        return trainer._to_batch(trainer._next_columns())

    first = batch()
    assert torch.equal(batch()["tokens"], first["tokens"])
    trainer.train_dataloader_it = iter([])
    assert torch.equal(batch()["tokens"], first["tokens"])


@pytest.fixture
def loop(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RefineTrainer]:
    """A trainer whose `fit` runs to step 3 of a made-up training in tmp_path."""

    def build(*more: str, start: int = 0, **kwargs: Any) -> RefineTrainer:
        every = ("trainer.logger=[]", "trainer.save_freq=2", "trainer.test_freq=3", "refine.warmup_steps=0")
        trainer = make(*every, *more, **kwargs)
        trainer.global_steps, trainer.total_training_steps = start, 3
        trainer.run_dir = tmp_path
        trainer.val_dataset, trainer.val_dataloader = [0] * 3, [columns(3)]
        trainer.saved = []
        monkeypatch.setattr(trainer, "_save_checkpoint", lambda: trainer.saved.append(trainer.global_steps))
        trainer._init_dump_executor()
        return trainer

    return build


def lines(directory: Path) -> list[dict[str, Any]]:
    return read_metrics(directory / "metrics.jsonl")


def test_the_loop_validates_saves_and_exports_when_due(loop: Make, tmp_path: Path) -> None:
    trainer = loop()
    trainer.fit()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert ["val/ntp_loss" in line for line in lines(tmp_path)] == [True, False, False, True]
    assert trainer.saved == [2, 3]
    assert trainer.actor_rollout_wg.exported == [str(tmp_path / "model")]
    # 3 documents of 20, 21 and 22 tokens; a dummy for the second worker does not count
    assert lines(tmp_path)[0]["val/ntp_loss"] == pytest.approx((19 * 1 + 20 * 2 + 21 * 3) / 60)


def test_a_resumed_loop_goes_on_in_the_same_file(loop: Make, tmp_path: Path) -> None:
    old = [{"step": step, "actor/ntp_loss": 9.0} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    trainer = loop(start=2)
    trainer.fit()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert lines(tmp_path)[:3] == old[:3] and lines(tmp_path)[3]["actor/ntp_loss"] == 2.0


def test_a_run_without_a_checkpoint_starts_its_file_again(loop: Make, tmp_path: Path) -> None:
    """Killed before its first checkpoint: what it had measured is measured again, step 0 too."""
    old = [{"step": step, "actor/ntp_loss": 9.0} for step in range(2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    loop().fit()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert 9.0 not in [line.get("actor/ntp_loss") for line in lines(tmp_path)]


def test_a_diverged_loop_leaves_its_last_step_and_a_checkpoint(loop: Make, tmp_path: Path) -> None:
    trainer = loop("trainer.save_freq=-1", grad_norms=(math.nan, math.inf))
    with pytest.raises(TrainingDiverged, match="step 3: 5 updates in a row"):
        trainer.fit()
    assert trainer.saved == [3] and trainer.actor_rollout_wg.exported == []
    last = lines(tmp_path)[-1]
    assert last["step"] == 3 and last["actor/skipped_updates"] == 2 and last["actor/ntp_loss"] is None


@pytest.mark.parametrize(
    ("at", "saved", "frequency"),
    [(1, [1], 2), (2, [2], 2), (1, [1], -1), (3, [], -1)],
    ids=["unsaved", "saved already", "nothing is due", "last step"],
)
def test_a_signal_ends_the_loop_after_the_step_with_a_checkpoint(
    loop: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, saved: list[int], frequency: int
) -> None:
    trainer = loop(f"trainer.save_freq={frequency}")
    step = trainer.step

    def interrupted(*args: Any) -> int:
        if trainer.global_steps == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return int(step(*args))

    monkeypatch.setattr(trainer, "step", interrupted)
    with StopSignals() as trainer.signals:
        if at == 3:  # the run ends by itself
            trainer.fit()
        else:
            with pytest.raises(Stopped, match=f"SIGTERM after step {at}; .* from {tmp_path}/global_step_{at}"):
                trainer.fit()
    assert trainer.saved == saved
    assert [line["step"] for line in lines(tmp_path)] == list(range(at + 1))
    assert bool(trainer.actor_rollout_wg.exported) == (at == 3)


def test_a_signal_during_the_first_validation_saves_nothing(
    loop: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = loop()
    monkeypatch.setattr(trainer, "_validate", lambda: os.kill(os.getpid(), signal.SIGINT))
    with StopSignals() as trainer.signals, pytest.raises(KeyboardInterrupt) as stopped:
        trainer.fit()
    assert stopped.type is KeyboardInterrupt and trainer.saved == [] and lines(tmp_path) == []


@pytest.mark.parametrize("frequency", [1, -1], ids=["validated", "not"])
def test_a_line_lost_between_checkpoint_and_validation_is_written_on_resume(
    loop: Make, tmp_path: Path, frequency: int
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    trainer = loop(f"trainer.test_freq={frequency}", start=2)
    (tmp_path / "metrics.json").write_text('{"actor/ntp_loss": 9.0}')
    trainer.lost_metrics = trainer._metrics_without_a_line(tmp_path)
    assert trainer.lost_metrics == {"actor/ntp_loss": 9.0}
    trainer.fit()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert lines(tmp_path)[2]["actor/ntp_loss"] == 9.0 and ("val/ntp_loss" in lines(tmp_path)[2]) == (frequency == 1)
    # the control: a line that is there is left alone
    trainer.global_steps = 2
    assert trainer._metrics_without_a_line(tmp_path) is None


@pytest.mark.parametrize("start", [3, 4], ids=["done", "past it"])
def test_fewer_steps_than_the_checkpoint_has(
    loop: Make, tmp_path: Path, start: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is trained; that the model is one of a later step than asked for is said."""
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": {start}}}\n')
    trainer = loop(start=start)
    trainer.fit()
    assert trainer.actor_rollout_wg.calls == [] and trainer.actor_rollout_wg.exported == [str(tmp_path / "model")]
    past = "the checkpoint of step 4 is past the 3 steps asked for (trainer.total_training_steps): nothing is trained"
    said = f"{past}, and {tmp_path / 'model'} is that of step 4"
    assert (said in caplog.text) == (start > 3)


@pytest.mark.parametrize("steps", [3, 4, 8])
def test_a_warm_up_that_outlasts_the_run_is_said(loop: Make, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    loop(f"actor_rollout_ref.actor.optim.lr_warmup_steps={steps}", "actor_rollout_ref.actor.optim.lr=0.4").fit()
    said = "warms up for 8 steps (actor_rollout_ref.actor.optim.lr_warmup_steps) and the run has 3: it ends at 0.15 and"
    assert (said in caplog.text) == (steps == 8) and ("warms up" in caplog.text) == (steps > 3)


@pytest.mark.parametrize("start", [0, 2], ids=["fresh", "from a checkpoint"])
def test_validation_alone_trains_and_exports_nothing(loop: Make, tmp_path: Path, start: int) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n')
    trainer = loop("trainer.val_only=true", start=start)
    trainer.fit()
    assert [name for name, _ in trainer.actor_rollout_wg.calls] == ["score"]
    assert [line["step"] for line in lines(tmp_path)] == [5, start]  # and takes nothing away
    assert trainer.actor_rollout_wg.exported == [] and trainer.saved == []


@pytest.mark.parametrize(("rows", "size", "ranks"), [(8, 4, 1), (8, 4, 2), (12, 6, 3), (16, 4, 4), (6, 6, 2)])
def test_mini_batches_hold_the_same_documents_for_any_number_of_ranks(rows: int, size: int, ranks: int) -> None:
    order = mini_batch_order(rows, size, ranks)
    assert sorted(order) == list(range(rows))
    shares = [order[rank * rows // ranks : (rank + 1) * rows // ranks] for rank in range(ranks)]
    part = size // ranks
    for batch in range(rows // size):
        documents = [row for share in shares for row in share[batch * part : (batch + 1) * part]]
        assert documents == list(range(batch * size, (batch + 1) * size))
