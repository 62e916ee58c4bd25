"""Post-training (paper, Sec. 4.3): for every batch first the prompts, then the answers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer

from refine_verl.data.prompts_dataset import collate_columns
from refine_verl.nsp import reward_metrics
from refine_verl.preflight.reward_function import RewardFunction, load_reward_function
from refine_verl.record.predictions import mean_scores
from refine_verl.trainer.prompts import Columns, PromptTrainer
from refine_verl.workers.advantage import answer_advantages
from refine_verl.workers.objective import Objective


class PosttrainTrainer(PromptTrainer):
    """Nested training: an inner phase on the prompts of a batch, then an outer phase on its answers.

    ``refine.inner`` and ``refine.outer`` say what each does; each takes one optimiser step per mini-batch, with one
    optimiser. The learning rate's schedule moves once per batch.
    """

    def _still_holds(self, row: Mapping[str, Any]) -> bool:
        if "step" not in row:  # of a test-time run, with resume_mode=disable
            return False
        if self.config.trainer.val_only:  # makes the answers of its step again and leaves all others
            return bool(row["step"] != self.global_steps)
        # nor does a validation stay that is made again because its line in metrics.jsonl was lost
        return bool(row["step"] <= (self.global_steps or -1) - (self.lost_metrics is not None))

    def step(self, metrics: dict[str, float], timing_raw: dict[str, float]) -> int:
        """One batch, prompts first. Returns the number of tokens of its prompts and reference answers."""
        columns = self._next_columns()
        forward_tokens = 0.0
        if self.settings.inner != "none":
            forward_tokens, _ = self.learn(self.prompts(columns), metrics, timing_raw, hold_learning_rate=True)
        outer = {"sft": self._imitate, "grpo": self._reinforce}[self.settings.outer]
        forward_tokens += outer(columns, metrics, timing_raw)
        tokens = int(collate_columns(columns)["joined_lengths"].sum())
        metrics["perf/forward_tokens_per_token"] = forward_tokens / tokens
        return tokens

    def _imitate(self, columns: Columns, metrics: dict[str, float], timing_raw: dict[str, float]) -> float:
        """``outer: sft``: next-token loss on the tokens of the reference answers, given their prompts."""
        batch = collate_columns(columns)
        answers = {
            "tokens": batch["joined"],
            "lengths": batch["joined_lengths"],
            "learn_from": batch["lengths"],
            "weight": batch["weight"],
        }
        with marked_timer("update_answers", timing_raw):
            return self._update(
                self._message(answers), Objective.REFERENCES, metrics, "answer", self.settings.outer_mini_batch_size
            )

    def _reinforce(self, columns: Columns, metrics: dict[str, float], timing_raw: dict[str, float]) -> float:
        """``outer: grpo``: sample answers, score them, compare the answers to one prompt with each other."""
        settings = self.settings.answers
        with marked_timer("answer", timing_raw):
            answers, forward_tokens = self.answer(columns, samples=settings.samples, temperature=settings.temperature)
        with marked_timer("score", timing_raw):
            rewards = torch.tensor(
                [
                    [sum(self.scores(columns, row, text).values()) for text in row_texts]
                    for row, row_texts in enumerate(self.texts(answers))
                ],
                dtype=torch.float32,
            )
        metrics.update(reward_metrics("answer", rewards[:, None]))
        metrics["answer/length/mean"] = answers["answer_lengths"].float().mean().item()
        batch = self.prompts(columns)
        batch.update(answers.select("answer_tokens", "answer_lengths", "old_log_probs"))
        batch["advantages"] = answer_advantages(
            rewards, answers["answer_lengths"], batch["answer_tokens"].shape[-1], self.config.algorithm
        )
        tu.assign_non_tensor(batch, temperature=settings.temperature)
        with marked_timer("update_answers", timing_raw):
            size = self.settings.outer_mini_batch_size
            return forward_tokens + self._update(batch, Objective.ANSWERS, metrics, "answer", size)

    @functools.cached_property
    def reward_function(self) -> RewardFunction | None:
        """The user's, which stands in for the metrics of the tasks."""
        return load_reward_function(self.config)

    def scores(self, columns: Columns, row: int, text: str) -> dict[str, float]:
        """As its parent's, or the score of ``reward.custom_reward_function`` under that function's name."""
        if self.reward_function is None:
            return super().scores(columns, row, text)
        task, references = str(columns["task"][row]), [str(answer) for answer in columns["answers"][row]]
        about = {"id": str(columns["id"][row]), "answers": references, "classes": list(columns["classes"][row])}
        score = self.reward_function(task, text, references, about)
        return {str(self.config.reward.custom_reward_function.name): score}

    def _validate(self, *_: Any) -> dict[str, float]:
        """Greedy answers to every validation prompt, each scored once; kept in predictions.jsonl."""
        rows = [row for columns in self.val_dataloader for row in self.answered(columns)]
        self.predictions.write([{"step": self.global_steps, **row} for row in rows])
        return mean_scores(rows)
