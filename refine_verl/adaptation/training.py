"""The four steps of the paper on a handful of prompts, in one process (Sec. 3.2 and 3.3)."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refine_verl.adaptation.guard import set_training
from refine_verl.adaptation.prompts import Prompts
from refine_verl.adaptation.settings import AdaptSettings
from refine_verl.models import (
    Branches,
    FastWeightActor,
    RolloutBatch,
    RolloutDraws,
    documents_together,
    snapshot_count,
)
from refine_verl.nsp import (
    group_standardise,
    group_zero_std_share,
    ppo_clip_loss,
    refine_objective,
)
from refine_verl.workers.reward_manager import HiddenStateRewardManager

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """Rollouts of one prompt: positions [1, c], tokens and log-probs [1, c, n, k], rewards and advantages [1, c, n]."""

    branches: Branches
    old_log_probs: Tensor
    rewards: dict[str, Tensor]
    advantages: Tensor


class Adaptation:
    """AdamW on the trainable parameters of an actor; lives as long as one adaptation."""

    def __init__(self, actor: FastWeightActor, prompts: Prompts, settings: AdaptSettings) -> None:
        self.actor, self.prompts, self.settings = actor, prompts, settings
        self.device = next(actor.parameters()).device
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

    def run(self) -> list[dict[str, float]]:
        """``steps`` passes over the prompts. Returns the metrics of every optimiser step."""
        history: list[dict[str, float]] = []
        rows = range(len(self.prompts))
        for index in range(1, self.settings.steps + 1):
            written = self.write(index) if self.settings.reinforces else None
            for mini_batch in _parts(rows, self.settings.mini_batch_size):
                history.append({"step": len(history) + 1, **self.step(mini_batch, written)})
        return history

    def write(self, index: int) -> list[Written]:
        """Steps 1 to 3 for all prompts: positions, rollouts from forked states, rewards, advantages.

        Args:
            index: number of the pass, from 1; a part of the key of all random draws.
        """
        set_training(self.actor, False)
        written: list[Written] = []
        size = documents_together(self.settings.nsp, self.settings.micro_batch_size)
        for part in _parts(range(len(self.prompts)), size):
            documents = self.prompts.documents(part, self.device)
            rollouts = FastWeightActor.forward(
                self.actor,
                mode="rollout",
                documents=documents,
                nsp=self.settings.nsp,
                draws=RolloutDraws.of(
                    self.settings.seed, index, [self.prompts.ids[row] for row in part], self.settings.nsp
                ),
                snapshots=snapshot_count(self.settings.nsp.chunks, max(documents.lengths)),
                read_together=self.settings.micro_batch_size,
            )
            written += self._judge(rollouts)
        return written

    def _judge(self, rollouts: RolloutBatch) -> Iterator[Written]:
        rewards = self.reward(rollouts)
        advantages = group_standardise(
            rewards["rewards"], self.settings.nsp.group, divide_by_std=self.settings.norm_adv_by_std_in_grpo
        )
        for row in range(len(rollouts.positions)):
            one = slice(row, row + 1)
            yield Written(
                Branches(rollouts.positions[one], rollouts.tokens[one]),
                rollouts.log_probs[one],
                {name: values[one] for name, values in rewards.items()},
                advantages[one],
            )

    def step(self, rows: Sequence[int], written: list[Written] | None) -> dict[str, float]:
        """Step 4 for one mini-batch: gradients, clipping and one step of AdamW.

        A gradient that is not finite changes nothing and is counted in ``actor/skipped_updates``.
        """
        set_training(self.actor, True)
        gradients, metrics = self._gradients(rows, written)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad).item()
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
        else:
            logger.warning("adapt: the gradient is not finite (norm %s); this step is skipped", norm)
        for parameter in self.parameters:
            parameter.grad = None
        metrics.update({"actor/grad_norm": norm, "actor/lr": self.settings.lr})
        metrics["actor/skipped_updates"] = float(not finite)
        return metrics

    def _gradients(
        self, rows: Sequence[int], written: list[Written] | None
    ) -> tuple[list[Tensor | None], dict[str, float]]:
        """Of the mini-batch's loss, added up over its micro-batches.

        Asked for by name instead of gathered in ``.grad``: a user's hooks that step an optimiser in the backward
        pass stay silent.
        """
        nsp = self.settings.nsp
        rollouts = len(rows) * nsp.chunks * nsp.rollouts_per_position
        total: list[Tensor | None] = [None] * len(self.parameters)
        metrics: dict[str, float] = {"actor/loss": 0.0}
        for part in _parts(rows, self.settings.micro_batch_size):
            chosen = [written[row] for row in part] if written is not None else []
            output = FastWeightActor.forward(
                self.actor,
                mode="update",
                documents=self.prompts.documents(part, self.device),
                branches=_branches(chosen),
                nsp=nsp,
            )
            loss, shares = refine_objective(
                output["ntp_loss_sum"],
                self.prompts.count(part),
                output.get("log_probs"),
                torch.cat([one.old_log_probs for one in chosen]).flatten(0, 2) if chosen else None,
                torch.cat([one.advantages for one in chosen]).flatten() if chosen else None,
                policy_loss=self.policy_loss,
                rl_coef=self.settings.loss.rl_coef if chosen else 0.0,
                sft_coef=self.settings.loss.sft_coef,
                global_tokens=self.prompts.count(rows),
                global_rollouts=rollouts,
            )
            for place, gradient in enumerate(torch.autograd.grad(loss, self.parameters, allow_unused=True)):
                so_far = total[place]
                total[place] = _sum(so_far, gradient)
            metrics["actor/loss"] += loss.item()
            for name, value in shares.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
        if written is not None:
            metrics.update(_reward_metrics([written[row] for row in rows], nsp.group))
        return total, metrics


def _parts(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _branches(chosen: list[Written]) -> Branches | None:
    if not chosen:
        return None
    return Branches(
        torch.cat([one.branches.positions for one in chosen]), torch.cat([one.branches.tokens for one in chosen])
    )


def _reward_metrics(chosen: list[Written], group: str) -> dict[str, float]:
    rewards = torch.cat([one.rewards["rewards"] for one in chosen])
    return {
        "nsp/reward/mean": rewards.mean().item(),
        "nsp/reward/std": rewards.std(unbiased=False).item(),
        "nsp/reward_cosine/mean": torch.cat([one.rewards["reward_cosine"] for one in chosen]).mean().item(),
        "nsp/reward_binary/mean": torch.cat([one.rewards["reward_binary"] for one in chosen]).mean().item(),
        "nsp/group_zero_std": group_zero_std_share(rewards, group),
    }


def _sum(so_far: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if so_far is None or gradient is None:
        return gradient if so_far is None else so_far
    return so_far + gradient
