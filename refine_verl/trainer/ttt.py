"""Test-time training (paper, Sec. 4.4): adapt to the prompts of a batch, answer them, return to the start."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer

from refine_verl.data.verl_dataset import VerlDocumentDataset
from refine_verl.record.metrics import read_metrics
from refine_verl.record.predictions import PREDICTIONS_FILE, mean_scores
from refine_verl.trainer.prompts import Columns, PromptTrainer
from refine_verl.trainer.refine_trainer import Record

logger = logging.getLogger(__name__)

_LONGEST_NAME = 120


class TTTTrainer(PromptTrainer):
    """Adapts on test prompts, which it never sees the answers of, and scores what is generated afterwards.

    With ``refine.ttt.reset`` ``batch`` or ``sample`` every batch starts from the same weights, optimiser and random
    state. What a batch holds and every random draw then depend on its prompts alone, so that results do not depend
    on the order of the rows. With ``none`` they do: adaptation carries on from batch to batch, in file order.
    """

    val_dataset: VerlDocumentDataset
    ids: list[str]
    rows_of: list[list[int]]
    answers: list[dict[str, Any]]

    @property
    def resets(self) -> bool:
        """Whether every batch starts from the same weights."""
        return self.settings.ttt.reset != "none"

    def _begin(self) -> None:
        """Every test prompt that has no line in ``predictions.jsonl`` yet is to be answered."""
        self.rows_of = self.batches()
        self.total_training_steps = len(self.rows_of)
        self.finished = {row["id"] for row in self.predictions.rows}
        if self.resets:
            # batches are finished one after the other; a batch that was interrupted is adapted to again
            complete = (all(self.ids[row] in self.finished for row in batch) for batch in self.rows_of)
            self.global_steps = next((step for step, done in enumerate(complete) if not done), len(self.rows_of))
        if self.global_steps:
            logger.info("%d of %d batches are answered already", self.global_steps, len(self.rows_of))

    def _before_the_first_step(self, record: Record) -> None:
        history = read_metrics(self.run_dir / "metrics.jsonl")
        if self.global_steps and (not history or history[-1]["step"] < self.global_steps):  # a kill took the line
            record(running_means(self.predictions.rows))
        if self.resets:
            self.left_something = True  # answers
            self.actor_rollout_wg.snapshot()

    def _completed(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of a batch and of all answers so far; writes those of the batch."""
        self.predictions.write([row for row in self.answers if row["id"] not in self.finished])
        return {**metrics, **running_means(self.predictions.rows)}

    def _stop_if_asked(self, saved: bool, where: str | None = None) -> None:
        if self.resets:
            saved, where = True, f"behind the last answer in {PREDICTIONS_FILE}"
        super()._stop_if_asked(saved, where)

    def _export(self) -> None:
        if not self.resets:
            super()._export()

    def batches(self) -> list[list[int]]:
        """Rows of the test set that are adapted to together."""
        rows = list(range(len(self.val_dataset)))
        keys = [(row["document_id"], str(row["id"])) for row in map(self.val_dataset.__getitem__, rows)]
        self.ids = [name for _, name in keys]
        if self.resets:
            rows.sort(key=lambda row: keys[row])
        size = 1 if self.settings.ttt.reset == "sample" else self.config.data.train_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _still_holds(self, row: Mapping[str, Any]) -> bool:
        """Not if the run starts over; where adaptation carries on, not what came after the checkpoint."""
        if self.config.trainer.resume_mode == "disable":
            return False
        return self.resets or row["batch"] <= self.global_steps

    # One batch

    def step(self, metrics: dict[str, float], timing_raw: dict[str, float]) -> int:
        """Adapt to the prompts of a batch and answer them, for a line of ``predictions.jsonl`` each.

        However this ends, with an error or not, weights are back at the start afterwards.

        Returns:
            The number of tokens of its prompts.
        """
        rows = [self.val_dataset[row] for row in self.rows_of[self.global_steps - 1]]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        before = self._timed_answers("answer_before", columns, timing_raw) if self.settings.ttt.baseline else None
        try:
            curves = self._adapt(columns, metrics, timing_raw)
            after = self._timed_answers("answer", columns, timing_raw)
            if self.settings.ttt.keep is not None:
                with marked_timer("keep", timing_raw):
                    self._keep(Path(self.settings.ttt.keep), [str(name) for name in columns["id"]])
        finally:
            if self.resets:
                self.actor_rollout_wg.restore()
                self.skipped_in_a_row = 0
        self.answers = []
        for index, answered in enumerate(after):
            row = {"id": answered.pop("id"), "batch": self.global_steps, **answered, "adaptation": curves[index]}
            if before is not None:
                row["prediction_before"], row["scores_before"] = before[index]["prediction"], before[index]["scores"]
            self.answers.append(row)
        return sum(map(len, columns["prompt_ids"]))

    def _keep(self, directory: Path, ids: list[str]) -> None:
        """Write what was learned from the prompts of a batch as an adapter; one that is there already is replaced."""
        alone = self.settings.ttt.reset == "sample"
        name = directory_name(ids[0]) if alone else f"batch_{self.global_steps:05}"
        self.actor_rollout_wg.save_adapter(str(directory / name), {"rows": ids, "batch": self.global_steps})

    def _timed_answers(self, name: str, columns: Columns, timing: dict[str, float]) -> list[dict[str, Any]]:
        with marked_timer(name, timing):
            return self.answered(columns)

    def _adapt(
        self, columns: Columns, metrics: dict[str, float], timing: dict[str, float]
    ) -> list[list[dict[str, float]]]:
        """``refine.ttt.steps`` times the paper's four steps on the prompts. Returns each prompt's curve."""
        real = 1 if self.settings.ttt.reset == "sample" else self.settings.ppo_mini_batch_size
        order, weight = filled_mini_batches(columns, real, self.actor_rollout_wg.world_size)
        how = {"size": -(-real // self.actor_rollout_wg.world_size) * self.actor_rollout_wg.world_size}
        if self.settings.ttt.reset == "sample":
            how["micro_batch_size_per_gpu"] = 1
        curves: list[list[dict[str, float]]] = [[] for _ in columns["id"]]
        forward_tokens = 0.0
        for step in range(self.settings.ttt.steps):
            # draws depend on the pass and the prompt, not on how many batches came before
            batch = tu.index_select_tensor_dict(self.prompts(columns, step=step + 1), order)
            batch["weight"] = weight
            points = self._losses(batch, timing)
            forwarded, rewards = self.learn(batch, metrics, timing, **how)
            forward_tokens += forwarded
            if rewards is not None:
                means = rewards.flatten(1).mean(dim=1)[weight > 0].tolist()
                points = [{**point, "reward": mean} for point, mean in zip(points, means, strict=True)]
            for curve, point in zip(curves, points, strict=True):
                curve.append({"step": step, **point})
        metrics["perf/forward_tokens_per_token"] = forward_tokens / (
            sum(map(len, columns["prompt_ids"])) * self.settings.ttt.steps
        )
        if self.settings.ttt.curve:
            for curve, point in zip(curves, self._losses(batch, timing), strict=True):
                curve.append({"step": self.settings.ttt.steps, **point})
            metrics["ttt/loss_before"] = sum(curve[0]["loss"] for curve in curves) / len(curves)
            metrics["ttt/loss_after"] = sum(curve[-1]["loss"] for curve in curves) / len(curves)
        return curves

    def _losses(self, batch: TensorDict, timing: dict[str, float]) -> list[dict[str, float]]:
        """Mean next-token loss of each prompt under the weights as they are."""
        real = batch["weight"] > 0
        if not self.settings.ttt.curve:
            return [{} for _ in range(int(real.sum()))]
        with marked_timer("curve", timing):
            scores = self.actor_rollout_wg.score(batch).get()
        return [{"loss": loss} for loss in (scores["loss"] / (batch["lengths"] - 1))[real].tolist()]


def filled_mini_batches(columns: Columns, size: int, workers: int) -> tuple[list[int], Tensor]:
    """Rows in mini-batches of ``size``, each filled up so that ``workers`` can share it equally.

    Returns:
        The row in each place, the shortest one in places that are left over, and weights float32, 0 for these.
    """
    lengths = [len(tokens) for tokens in columns["prompt_ids"]]
    dummy = lengths.index(min(lengths))
    width = -(-size // workers) * workers
    order: list[int] = []
    weight: list[float] = []
    for start in range(0, len(lengths), size):
        rows = list(range(start, min(start + size, len(lengths))))
        order += rows + [dummy] * (width - len(rows))
        weight += [1.0] * len(rows) + [0.0] * (width - len(rows))
    return order, torch.tensor(weight)


def directory_name(row: str) -> str:
    """A name for a directory that says which row it is of: its id, as in a URL where characters cannot be in names.

    Long ones are cut and end with a checksum of the whole; none begins with a dot.
    """
    name = quote(row, safe=" ()[]=,+@")
    name = f"%2E{name[1:]}" if name.startswith(".") else name
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 17]}-{hashlib.sha256(row.encode()).hexdigest()[:16]}"


def running_means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """``val/<task>/<metric>`` and ``val/<task>/before/<metric>`` over all answers so far."""
    return {**mean_scores(rows), **mean_scores(rows, "scores_before", "before/")}
