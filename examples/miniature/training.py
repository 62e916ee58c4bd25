"""Mid-training in one process, with an account of what it costs.

Positions, rollouts, rewards, advantages and the objective are those of `refine_verl.adapt`
(:class:`~refine_verl.adaptation.training.Loop`), on a stream of batches instead of one set of prompts. What is left out
is what a model of a hundred thousand parameters does not need: ranks, sharding, mixed precision, checkpoints.

    loop = Loop(make_actor(model), AdaptSettings(nsp=NSPSettings(chunks=4), lr=5e-4, mini_batch_size=8))
    for index in range(1, 101):
        metrics = loop.train(index, Documents.from_tensors(tokens, lengths), document_ids)
    loop.compute.rollout_tokens, loop.compute.trained_tokens, loop.compute.processor_seconds
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refine_verl.adaptation import training
from refine_verl.adaptation.settings import AdaptSettings
from refine_verl.models import Documents, FastWeightActor
from refine_verl.models.step import Rollouts


@dataclass
class Compute:
    """What a loop has used so far.

    Attributes:
        rollout_tokens: put through the model forward only (reading for rollouts, replaying, writing).
        trained_tokens: put through it forward and backward.
        processor_seconds: of all threads of this process, in steps only.
        steps: optimiser steps.
    """

    rollout_tokens: int = 0
    trained_tokens: int = 0
    processor_seconds: float = 0.0
    steps: int = 0

    @property
    def token_passes(self) -> float:
        """Forward passes over one token, a backward pass counting as two forward ones."""
        return self.rollout_tokens + 3.0 * self.trained_tokens


class Loop(training.Loop):
    """Takes batch after batch of documents through the four steps of the paper, and counts."""

    def __init__(self, actor: FastWeightActor, settings: AdaptSettings) -> None:
        super().__init__(actor, settings)
        self.compute = Compute()

    def train(self, index: int, documents: Documents, ids: Sequence[int], lr_scale: float = 1.0) -> dict[str, float]:
        """One batch: rollouts of all its documents, then one optimiser step for each of its mini-batches.

        Args:
            index: number of the batch, from 1; a part of the key of all random draws.
            documents: the batch.
            ids: one number per document, the other part of that key.
            lr_scale: what the learning rate is multiplied with (schedules are the caller's).

        Returns:
            Metrics under the names of the trainer, averaged over the mini-batches.

        Raises:
            FloatingPointError: a gradient is not finite.
        """
        started = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * lr_scale
        history = self.learn(index, documents, ids)
        self.compute.processor_seconds += time.process_time() - started
        return {name: sum(one[name] for one in history) / len(history) for name in history[0]}

    def write(self, index: int, documents: Documents, ids: Sequence[int]) -> dict[str, Tensor]:
        """As its parent's; counts the tokens."""
        before = self.actor.forward_tokens
        written = super().write(index, documents, ids)
        self.compute.rollout_tokens += self.actor.forward_tokens - before
        return written

    def gradients(self, documents: Documents, written: Rollouts | None) -> tuple[list[Tensor | None], dict[str, float]]:
        """As its parent's; counts the tokens."""
        before = self.actor.forward_tokens
        found = super().gradients(documents, written)
        self.compute.trained_tokens += self.actor.forward_tokens - before
        return found

    def flat_gradient(self, documents: Documents, written: Rollouts | None) -> tuple[Tensor, dict[str, float]]:
        """All of it in one row [P], 0 where the loss does not depend on a parameter; and the metrics."""
        found, metrics = self.gradients(documents, written)
        rows = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self.parameters, found, strict=True)
        ]
        return torch.cat([row.flatten() for row in rows]), metrics

    def step(self, documents: Documents, written: Rollouts | None) -> dict[str, float]:
        """As its parent's, but a gradient that is not finite ends the training."""
        metrics = super().step(documents, written)
        if metrics["actor/skipped_updates"]:
            raise FloatingPointError(
                f"the gradient is not finite (norm {metrics['actor/grad_norm']}) at step {self.compute.steps + 1}"
            )
        self.compute.steps += 1
        return metrics
