"""What post-training and test-time training share: batches of prompts, answers to them, and their scores."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.model import get_generation_config

from refine_verl.data.prompts_dataset import collate_columns
from refine_verl.nsp import end_tokens
from refine_verl.record.predictions import PREDICTIONS_FILE, PredictionsFile
from refine_verl.scoring import score
from refine_verl.trainer.refine_trainer import RefineTrainer
from refine_verl.workers.worker import WorkerSettings

_PROMPT = ("tokens", "lengths", "document_id", "weight")
Columns = Mapping[str, Any]
"""Rows of `VerlPromptDataset`, column by column."""


class PromptTrainer(RefineTrainer):
    """A trainer whose batches are prompts with reference answers.

    Prompts and answers go to the workers in different messages: what is done with prompts cannot see an answer.

    Attributes:
        predictions: all answers that are kept.
    """

    predictions: PredictionsFile

    def fit(self) -> None:
        """As its parent's, with `predictions.jsonl` open; lines that no longer hold are dropped from it first."""
        file = PredictionsFile(self.run_dir / PREDICTIONS_FILE, self._still_holds)
        with contextlib.closing(file) as self.predictions:
            self._begin()
            super().fit()

    def _still_holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a line of an earlier start of the run stays."""
        raise NotImplementedError

    def _begin(self) -> None:
        """What is to be decided by the answers that are there."""

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's end of sequence and those of the model's generation config."""
        generation = get_generation_config(self.config.actor_rollout_ref.model.path)
        return end_tokens(generation, self.tokenizer.eos_token_id)

    def _worker_settings(self) -> WorkerSettings:
        return dataclasses.replace(super()._worker_settings(), stop_tokens=self.stop_tokens)

    def prompts(self, columns: Columns, step: int | None = None) -> TensorDict:
        """The prompts of a batch as documents; random draws depend on ``step`` (None: the step of the run)."""
        batch = collate_columns(columns)
        return self._message({name: batch[name] for name in _PROMPT}, step=step)

    def answer(self, columns: Columns, *, samples: int = 1, temperature: float = 0.0) -> tuple[TensorDict, float]:
        """Generate answers to all rows, each up to its own limit.

        Returns:
            See `NSPRolloutWorker.answer`, one row per row of ``columns``; and the tokens put through the model.
        """
        batch = collate_columns(columns)
        tensors = {name: batch[name] for name in (*_PROMPT, "max_new_tokens")}
        asked = self._message(tensors, self.actor_rollout_wg.world_size)
        width = int(batch["max_new_tokens"].max())
        tu.assign_non_tensor(asked, samples=samples, temperature=temperature, answer_width=width)
        answers = self.actor_rollout_wg.answer(asked).get()
        return answers[: len(batch["lengths"])], float(answers["forward_tokens"].sum())

    def texts(self, answers: TensorDict) -> list[list[str]]:
        """The answers [b][n] as text, without the token that ended them."""
        return [
            [self._text(tokens[:length]) for tokens, length in zip(row, lengths.tolist(), strict=True)]
            for row, lengths in zip(answers["answer_tokens"], answers["answer_lengths"], strict=True)
        ]

    def _text(self, tokens: Tensor) -> str:
        ids = tokens.tolist()
        if ids[-1] in self.stop_tokens:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def scores(self, columns: Columns, row: int, text: str) -> dict[str, float]:
        """Scores of one answer to row ``row``, in the convention of ``refine.answers.convention``."""
        return score(
            columns["task"][row],
            text,
            list(columns["answers"][row]),
            self.settings.answers.convention,
            classes=list(columns["classes"][row]),
        )

    def answered(self, columns: Columns) -> list[dict[str, Any]]:
        """Greedy answers to all rows, with what `predictions.jsonl` says of each."""
        texts = self.texts(self.answer(columns)[0])
        return [
            {
                "id": str(columns["id"][row]),
                "task": str(columns["task"][row]),
                "prediction": text,
                "references": list(columns["answers"][row]),
                "scores": self.scores(columns, row, text),
                "convention": self.settings.answers.convention,
            }
            for row, (text,) in enumerate(texts)
        ]
