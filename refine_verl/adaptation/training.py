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
from refine_verl.models import (
    Branches,
    Documents,
    FastWeightActor,
    RolloutBatch,
    RolloutDraws,
    documents_together,
    snapshot_count,
)
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.nsp import group_standardise, group_zero_std_share, ppo_clip_loss, refine_objective

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """Steps 1 to 3 for N documents.

    Attributes:
        branches: positions [N, c] and tokens [N, c, n, k] of the rollouts.
        old_log_probs: [N, c, n, k], of the policy that wrote them.
        rewards: each [N, c, n], with the keys of `HiddenStateRewardManager`.
        advantages: [N, c, n].
        entropy_selected: [N, c], H of the first token to be predicted after each position.
    """

    branches: Branches
    old_log_probs: Tensor
    rewards: dict[str, Tensor]
    advantages: Tensor
    entropy_selected: Tensor

    def select(self, rows: Sequence[int]) -> Written:
        """Those of some of the documents."""
        index = torch.as_tensor(list(rows), device=self.advantages.device)
        return Written(
            Branches(self.branches.positions[index], self.branches.tokens[index]),
            self.old_log_probs[index],
            {name: values[index] for name, values in self.rewards.items()},
            self.advantages[index],
            self.entropy_selected[index],
        )


class Loop:
    """AdamW on the trainable parameters of an actor, driven by rollouts and the next-token loss.

    Attributes:
        actor: the model.
        settings: how it is trained.
        parameters: what is trained, in the order of `gradients`.
        optimizer: of those.
    """

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
        self.reward = HiddenStateRewardManager(settings.nsp.reward)
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

        Args:
            index: number of the pass, from 1; a part of the key of all random draws.
            documents: what is learnt from.
            ids: a number for each, the other part of that key.

        Returns:
            The metrics of every optimiser step.
        """
        written = self.write(index, documents, ids) if self.settings.reinforces else None
        return [
            self.step(documents.select(rows), None if written is None else written.select(rows))
            for rows in _parts(len(documents), self.settings.mini_batch_size)
        ]

    def write(self, index: int, documents: Documents, ids: Sequence[int]) -> Written:
        """Steps 1 to 3 for all documents: positions, rollouts from forked states, rewards, advantages."""
        set_training(self.actor, False)
        nsp = self.settings.nsp
        parts: list[tuple[RolloutBatch, dict[str, Tensor]]] = []
        for rows in _parts(len(documents), documents_together(nsp, self.settings.micro_batch_size)):
            part = documents.select(rows)
            rollouts = FastWeightActor.forward(
                self.actor,
                mode="rollout",
                documents=part,
                nsp=nsp,
                draws=RolloutDraws.of(self.settings.seed, index, [ids[row] for row in rows], nsp),
                snapshots=snapshot_count(nsp.chunks, max(part.lengths)),
                read_together=self.settings.micro_batch_size,
            )
            parts.append((rollouts, self.reward(rollouts)))
        return self._judge(parts)

    def _judge(self, parts: Sequence[tuple[RolloutBatch, dict[str, Tensor]]]) -> Written:
        rewards = {name: torch.cat([scores[name] for _, scores in parts]) for name in parts[0][1]}
        return Written(
            Branches(
                torch.cat([rollouts.positions for rollouts, _ in parts]),
                torch.cat([rollouts.tokens for rollouts, _ in parts]),
            ),
            torch.cat([rollouts.log_probs for rollouts, _ in parts]),
            rewards,
            group_standardise(
                rewards["rewards"], self.settings.nsp.group, divide_by_std=self.settings.norm_adv_by_std_in_grpo
            ),
            torch.cat([rollouts.entropy_selected for rollouts, _ in parts]),
        )

    def step(self, documents: Documents, written: Written | None) -> dict[str, float]:
        """Step 4 for one mini-batch: gradients, clipping and one step of AdamW.

        A gradient that is not finite changes nothing and is counted in ``actor/skipped_updates``.
        """
        gradients, metrics = self.gradients(documents, written)
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

    def gradients(self, documents: Documents, written: Written | None) -> tuple[list[Tensor | None], dict[str, float]]:
        """Of one mini-batch's loss, added up over its micro-batches, and its metrics. Changes no weight.

        Asked for by name instead of gathered in ``.grad``: a user's hooks that step an optimiser in the backward
        pass stay silent. None for a parameter that the loss does not depend on.
        """
        set_training(self.actor, True)
        total: list[Tensor | None] = [None] * len(self.parameters)
        metrics: dict[str, float] = {"actor/loss": 0.0}
        for rows in _parts(len(documents), self.settings.micro_batch_size):
            part, chosen = documents.select(rows), None if written is None else written.select(rows)
            output = FastWeightActor.forward(
                self.actor,
                mode="update",
                documents=part,
                branches=None if chosen is None else chosen.branches,
                nsp=self.settings.nsp,
            )
            loss, shares = refine_objective(
                output["ntp_loss_sum"],
                part.predicted,
                output.get("log_probs"),
                None if chosen is None else chosen.old_log_probs.flatten(0, 2),
                None if chosen is None else chosen.advantages.flatten(),
                policy_loss=self.policy_loss,
                rl_coef=0.0 if chosen is None else self.settings.loss.rl_coef,
                sft_coef=self.settings.loss.sft_coef,
                global_tokens=documents.predicted,
                global_rollouts=0 if written is None else written.advantages.numel(),
            )
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            total = [_sum(so_far, gradient) for so_far, gradient in zip(total, found, strict=True)]
            metrics["actor/loss"] += loss.item()
            for name, value in shares.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
        if written is not None:
            metrics.update(_reward_metrics(written, self.settings.nsp.group))
        return total, metrics


def _parts(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _reward_metrics(written: Written, group: str) -> dict[str, float]:
    rewards = written.rewards["rewards"]
    return {
        "nsp/reward/mean": rewards.mean().item(),
        "nsp/reward/std": rewards.std(unbiased=False).item(),
        "nsp/reward_cosine/mean": written.rewards["reward_cosine"].mean().item(),
        "nsp/reward_binary/mean": written.rewards["reward_binary"].mean().item(),
        "nsp/entropy_selected/mean": written.entropy_selected.mean().item(),
        "nsp/group_zero_std": group_zero_std_share(rewards, group),
    }


def _sum(so_far: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if so_far is None or gradient is None:
        return gradient if so_far is None else so_far
    return so_far + gradient
