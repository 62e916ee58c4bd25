"""Post-training (paper, Sec. 4.3): for every batch first the prompts, then the answers."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer

from refine_verl.data.prompts_dataset import collate_columns
from refine_verl.nsp import generation_seeds, reward_metrics
from refine_verl.preflight.answers import answered_splits, longest_answered
from refine_verl.preflight.reward_function import RewardFunction, load_reward_function
from refine_verl.record.predictions import mean_scores
from refine_verl.trainer.prompts import Columns, PromptTrainer
from refine_verl.trainer.servers import (
    AnswerServers,
    Request,
    ServerLost,
    Written,
    logging_as_it_is,
    sampling_parameters,
)
from refine_verl.workers.advantage import answer_advantages
from refine_verl.workers.objective import Objective

logger = logging.getLogger(__name__)


class PosttrainTrainer(PromptTrainer):
    """Nested training: an inner phase on the prompts of a batch, then an outer phase on its answers.

    ``refine.inner`` and ``refine.outer`` say what each does; each takes one optimiser step per mini-batch, with one
    optimiser. The learning rate's schedule moves once per batch.

    Attributes:
        servers: those that write answers with ``refine.answers.engine=vllm``; None: the training workers do.
        weights_version: counts the changes of the workers' weights since this start of the run; every answer of a
            server says with which of them it was written.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__(config)
        self.servers: AnswerServers | None = None
        self.servers_lost: ServerLost | None = None
        self.weights_version = 1

    def _setup(self) -> None:
        with logging_as_it_is() if self.settings.answers.engine == "vllm" else contextlib.nullcontext():
            super()._setup()
        if self.settings.answers.engine == "vllm":
            data = self.config.data
            limit = longest_answered(answered_splits(self.settings, data.train_files, data.val_files))
            servers = AnswerServers(self.config, self.actor_rollout_wg, limit, self.config.trainer.max_restarts)
            self.servers = servers  # before it starts: what has been started is ended, however this ends
            servers.start()

    def _update(self, *arguments: Any, **named: Any) -> float:
        self.weights_version += 1
        return super()._update(*arguments, **named)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """For as long as answers are asked for: servers keep their memory meanwhile."""
        with contextlib.nullcontext() if self.servers is None else self.servers.in_use():
            yield

    def answer(self, columns: Columns, *, samples: int = 1, temperature: float = 0.0) -> tuple[TensorDict, float]:
        """As its parent's, by the servers if there are any.

        Once servers are lost for good, the workers write what is left of the step, after which the run ends.
        """
        if self.servers is not None:
            try:
                return self._answers_of_servers(columns, samples, temperature)
            except ServerLost as lost:
                logger.warning("%s. The training workers write what is left of this step", lost)
                self.servers_lost = lost
                self.servers.end()
                self.servers = None
        return super().answer(columns, samples=samples, temperature=temperature)

    def _answers_of_servers(self, columns: Columns, samples: int, temperature: float) -> tuple[TensorDict, float]:
        assert self.servers is not None
        batch = collate_columns(columns)
        limits, ids = batch["max_new_tokens"].tolist(), batch["document_id"].tolist()
        prompts = [row[:length].tolist() for row, length in zip(batch["tokens"], batch["lengths"], strict=True)]
        requests: list[Request] = []
        for prompt, limit, number in zip(prompts, limits, ids, strict=True):
            name = f"{self.weights_version}-{number}"
            for seed in generation_seeds(self.config.data.seed, self.global_steps, number, samples):
                drawn = sampling_parameters(self.stop_tokens, temperature=temperature, limit=limit, seed=seed)
                requests.append((name, prompt, drawn))
        written = self.servers.write(requests, self.weights_version)
        read = sum(len(tokens) - answer.cached for (_, tokens, _), answer in zip(requests, written, strict=True))
        forward_tokens = read + sum(len(answer.tokens) - 1 for answer in written)
        return answers_in_rows(written, samples, max(limits)), float(forward_tokens)

    def _stop_if_asked(self, saved: bool, where: str | None = None) -> None:
        if self.servers_lost is None:
            super()._stop_if_asked(saved, where)
            return
        if not saved:
            self._save_checkpoint()
        raise ServerLost(
            f"{self.servers_lost}. Step {self.global_steps} was finished by the training workers and is saved in "
            f"{self.run_dir}/global_step_{self.global_steps}; the same command resumes from there. With "
            "trainer.max_restarts servers are started again, with refine.answers.engine=own there are none."
        )

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
        with marked_timer("answer", timing_raw), self._answering():
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
            forward_tokens += self._update(batch, Objective.ANSWERS, metrics, "answer", size)
        self._warn_of_gap(metrics)
        return forward_tokens

    def _warn_of_gap(self, metrics: dict[str, float]) -> None:
        gap, bound = metrics.get("answers/log_prob_gap/mean", 0.0), self.settings.answers.gap_warning
        if not gap <= bound and self.servers_lost is None:  # NaN is not
            logger.warning(
                "step %d: vLLM's log-probabilities of its answers are %.3f from the trainer's (at most %.3f), "
                "above refine.answers.gap_warning=%g: it draws from another distribution than the trained one",
                self.global_steps,
                gap,
                metrics["answers/log_prob_gap/max"],
                bound,
            )

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
        with self._answering():
            rows = [row for columns in self.val_dataloader for row in self.answered(columns)]
        self.predictions.write([{"step": self.global_steps, **row} for row in rows])
        return mean_scores(rows)


def answers_in_rows(written: list[Written], samples: int, width: int) -> TensorDict:
    """Answers of servers as those of `NSPRolloutWorker.answer`.

    Args:
        written: ``samples`` answers to each of b prompts, prompt by prompt.
        samples: n.
        width: A, the most tokens of any answer.

    Returns:
        ``answer_tokens`` int64 [b, n, A], ``answer_lengths`` int64 [b, n], ``old_log_probs`` float32 [b, n, A], 0 after
        the end of an answer; ``weights_version`` int64 [b, n].
    """
    tokens = torch.zeros(len(written), width, dtype=torch.int64)
    log_probs = torch.zeros(len(written), width)
    for row, answer in enumerate(written):
        tokens[row, : len(answer.tokens)] = torch.tensor(answer.tokens)
        log_probs[row, : len(answer.tokens)] = torch.tensor(answer.log_probs)
    lengths = torch.tensor([len(answer.tokens) for answer in written])
    versions = torch.tensor([answer.version for answer in written])
    columns = {"answer_tokens": tokens, "answer_lengths": lengths, "old_log_probs": log_probs}
    shaped = {name: values.unflatten(0, (-1, samples)) for name, values in columns.items()}
    return tu.get_tensordict(tensor_dict={**shaped, "weights_version": versions.unflatten(0, (-1, samples))})
