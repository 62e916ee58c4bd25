"""The four steps of the paper on a handful of documents, in one process (Sec. 3.2 and 3.3)."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refine_verl.adaptation.guard import set_training
from refine_verl.adaptation.settings import AdaptSettings
from refine_verl.models import Documents, FastWeightActor
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Rollouts, Step, in_parts
from refine_verl.nsp import group_standardise, ppo_clip_loss, rollout_metrics
from refine_verl.nsp.advantage import token_advantages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fresh:
    """The key of the draws of rollouts that are yet to be written: the number of the pass and those of documents."""

    index: int
    ids: Sequence[int]


class Loop:
    """AdamW on the trainable ``parameters`` of an actor, driven by rollouts and the next-token loss."""

    def __init__(self, actor: FastWeightActor, settings: AdaptSettings) -> None:
        self.actor, self.settings = actor, settings
        self.parameters: list[nn.Parameter] = [p for p in actor.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        # not through __call__: hooks of the user's are for his own passes
        run = functools.partial(FastWeightActor.forward, actor)
        self.model_step = Step(run, settings.nsp, settings.seed, read_together=settings.micro_batch_size)
        self.reward = HiddenStateRewardManager(settings.nsp.reward, credit=settings.nsp.credit)
        self.policy_loss = functools.partial(ppo_clip_loss, clip_ratio=settings.clip_ratio)

    def run(self, documents: Documents, ids: Sequence[int]) -> list[dict[str, float]]:
        """``settings.steps`` passes over the documents. Returns the metrics of every optimiser step."""
        history: list[dict[str, float]] = []
        for index in range(1, self.settings.steps + 1):
            for metrics in self.learn(index, documents, ids):
                history.append({"step": len(history) + 1, **metrics})
        return history

    def learn(self, index: int, documents: Documents, ids: Sequence[int]) -> list[dict[str, float]]:
        """One pass: rollouts of all documents, then one optimiser step for each mini-batch.

        The number of the pass, ``index``, from 1, and the number of a document in ``ids`` are the key of all random
        draws. Returns the metrics of every optimiser step.
        """
        size = self.settings.mini_batch_size
        if self.settings.on_policy and self.settings.reinforces:
            keys = (Fresh(index, ids[start:]) for start in range(0, len(documents), size))
            return [self.step(part, None, key) for part, key in zip(documents.split(size), keys, strict=True)]
        written = self.write(index, documents, ids) if self.settings.reinforces else None
        return [self.step(part, rollouts) for part, rollouts in in_parts(documents, written, size)]

    def write(self, index: int, documents: Documents, ids: Sequence[int]) -> dict[str, Tensor]:
        """Steps 1 to 3 for all documents: what `Step.write_and_reward` returns, and ``advantages`` [N, c, n, k]."""
        set_training(self.actor, False)
        rollouts = self.model_step.write_and_reward(index, documents, ids, self.reward)
        rollouts["advantages"] = self._compared(rollouts)
        return rollouts

    def _compared(self, rollouts: Rollouts) -> Tensor:
        nsp, divide = self.settings.nsp, self.settings.norm_adv_by_std_in_grpo
        compare = functools.partial(group_standardise, group=nsp.group, divide_by_std=divide)
        return token_advantages(rollouts, nsp, compare)

    def step(self, documents: Documents, written: Rollouts | None, fresh: Fresh | None = None) -> dict[str, float]:
        """Step 4 for one mini-batch: gradients, clipping and one step of AdamW.

        A gradient that is not finite changes nothing and is counted in ``actor/skipped_updates``.
        """
        how = () if fresh is None else (fresh,)  # a loop of one's own may know of rollouts written beforehand only
        gradients, metrics = self.gradients(documents, written, *how)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad).item()
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
        else:
            logger.warning("the gradient is not finite (norm %s); this step is skipped", norm)
        for parameter in self.parameters:
            parameter.grad = None
        metrics.update({"actor/grad_norm": norm, "actor/lr": self.optimizer.param_groups[0]["lr"]})
        metrics["actor/skipped_updates"] = float(not finite)
        return metrics

    def gradients(
        self, documents: Documents, written: Rollouts | None, fresh: Fresh | None = None
    ) -> tuple[list[Tensor | None], dict[str, float]]:
        """Of one mini-batch's loss by ``parameters``, added up over its micro-batches, and its metrics.

        Changes no weight. Asked for by name instead of gathered in ``.grad``: a user's hooks that step an optimiser in
        the backward pass stay silent. None for a parameter that the loss does not depend on.

        Args:
            documents: the mini-batch.
            written: its rollouts; None for the next-token loss alone, or with ``fresh``.
            fresh: write them in the trained passes.
        """
        set_training(self.actor, True)
        total: list[Tensor | None] = [None] * len(self.parameters)
        metrics: dict[str, float] = {"actor/loss": 0.0}
        nsp, used = self.settings.nsp, []
        rollouts_of_each = 0 if written is None and fresh is None else nsp.chunks * nsp.rollouts_per_position
        for start, (part, rollouts) in enumerate(in_parts(documents, written, self.settings.micro_batch_size)):
            output = None
            if fresh is not None:
                ids = fresh.ids[start * self.settings.micro_batch_size :][: len(part)]
                numbers, output = self.model_step.on_policy(fresh.index, part, ids, self.reward)
                rollouts = {**numbers, "advantages": self._compared(numbers)}
            loss, shares = self.model_step.loss(
                part,
                rollouts,
                self.settings.loss,
                output=output,
                policy_loss=self.policy_loss,
                global_tokens=documents.predicted,
                global_rollouts=len(documents) * rollouts_of_each,
            )
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            total = [_sum(so_far, gradient) for so_far, gradient in zip(total, found, strict=True)]
            metrics["actor/loss"] += loss.item()
            for name, value in shares.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
            used += [] if rollouts is None else [rollouts]
        if used:
            every = {name: torch.cat([rollouts[name] for rollouts in used]) for name in used[0]}
            metrics.update(rollout_metrics(every, nsp.group))
        return total, metrics


def _sum(so_far: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if so_far is None or gradient is None:
        return gradient if so_far is None else so_far
    return so_far + gradient
