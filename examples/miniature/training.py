"""Mid-training in one process: the parts the training worker is made of, without Ray and without verl.

Positions, rollouts, rewards, advantages and the objective are the package's own
(:class:`~refine_verl.models.FastWeightActor`, :class:`~refine_verl.workers.reward_manager.HiddenStateRewardManager`,
:func:`~refine_verl.nsp.group_standardise`, :func:`~refine_verl.nsp.refine_objective`). What is left out is what a model
of a hundred thousand parameters does not need: ranks, sharding, mixed precision, checkpoints.

    loop = Loop(make_actor(model), LoopSettings(method="refine", nsp=NSPSettings(chunks=4), lr=5e-4))
    for index in range(1, 101):
        metrics = loop.step(index, Documents.from_tensors(tokens, lengths), document_ids)
    loop.compute.rollout_tokens, loop.compute.trained_tokens, loop.compute.processor_seconds
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from refine_verl.config import LossSettings, NSPSettings, RefineSettings
from refine_verl.models import Branches, Documents, FastWeightActor, RolloutBatch, RolloutDraws, snapshot_count
from refine_verl.nsp import group_standardise, group_zero_std_share, ppo_clip_loss, refine_objective
from refine_verl.workers.reward_manager import HiddenStateRewardManager

METHODS = ("refine", "sft")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the loop trains; names and defaults are those of the mid-training recipe, but for sizes.

    Attributes:
        method: ``refine`` (policy loss and next-token loss) or ``sft`` (next-token loss only).
        nsp: c, k, n, reward, selection, group ...; its checks apply.
        loss: lambda_RL and lambda_SFT.
        divide_by_std: ``algorithm.norm_adv_by_std_in_grpo``.
        mini_batch_size: documents per optimiser step; None: the whole batch.
        micro_batch_size: documents per forward and backward pass; None: the whole mini-batch.
        lr, betas, eps, weight_decay: of AdamW.
        clip_grad: largest norm of a step's gradient.
        clip_ratio: epsilon of PPO-clip (Eq. 10).
        seed: of positions and rollouts.

    Raises:
        ConfigError: settings of ``nsp`` and ``loss`` that contradict each other.
        ValueError: unknown method.
    """

    method: str = "refine"
    nsp: NSPSettings = field(default_factory=NSPSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    divide_by_std: bool = True
    mini_batch_size: int | None = None
    micro_batch_size: int | None = None
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    clip_ratio: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: choose one of {', '.join(METHODS)}")
        if self.reinforces:
            RefineSettings(nsp=self.nsp, loss=self.loss)  # its rules between sections

    @property
    def reinforces(self) -> bool:
        """Whether rollouts are written."""
        return self.method == "refine" and self.loss.rl_coef > 0


@dataclass(frozen=True)
class Written:
    """Steps 1 to 3 for N documents: positions [N, c], tokens and log-probs [N, c, n, k], rewards, advantages [N, c, n].

    ``rewards`` has the keys of :class:`~refine_verl.workers.reward_manager.HiddenStateRewardManager`.
    """

    positions: Tensor
    tokens: Tensor
    log_probs: Tensor
    rewards: dict[str, Tensor]
    advantages: Tensor
    entropy_mean: Tensor
    entropy_selected: Tensor

    def rows(self, rows: Sequence[int]) -> Written:
        """Those of some of the documents."""
        index = torch.tensor(list(rows), device=self.positions.device)

        def pick(values: Tensor) -> Tensor:
            return values[index]

        return Written(
            pick(self.positions),
            pick(self.tokens),
            pick(self.log_probs),
            {name: pick(values) for name, values in self.rewards.items()},
            pick(self.advantages),
            pick(self.entropy_mean),
            pick(self.entropy_selected),
        )


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


def take(documents: Documents, rows: Sequence[int]) -> Documents:
    """Some of the documents, in the order of ``rows``."""
    first = documents.learn_from
    return Documents(
        documents.tokens[torch.tensor(list(rows), device=documents.tokens.device)],
        tuple(documents.lengths[row] for row in rows),
        None if first is None else tuple(first[row] for row in rows),
    )


class Loop:
    """AdamW on an actor; every :meth:`step` takes a batch of documents through the four steps of the paper."""

    def __init__(self, actor: FastWeightActor, settings: LoopSettings) -> None:
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
        self.compute = Compute()

    def step(self, index: int, documents: Documents, ids: Sequence[int], lr_scale: float = 1.0) -> dict[str, float]:
        """One batch: rollouts of all its documents, then one optimiser step for each of its mini-batches.

        Args:
            index: number of the step, from 1; a part of the key of all random draws.
            documents: the batch.
            ids: one number per document, the other part of that key.
            lr_scale: what the learning rate is multiplied with (schedules are the caller's).

        Returns:
            Metrics under the names of the trainer, averaged over the mini-batches.
        """
        started = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * lr_scale
        written = self.write(index, documents, ids) if self.settings.reinforces else None
        history = []
        for rows in _parts(range(len(documents)), self.settings.mini_batch_size):
            history.append(self._update(take(documents, rows), None if written is None else written.rows(rows)))
        metrics = {name: sum(one[name] for one in history) / len(history) for name in history[0]}
        self.compute.processor_seconds += time.process_time() - started
        return metrics

    def write(self, index: int, documents: Documents, ids: Sequence[int]) -> Written:
        """Steps 1 to 3: positions, rollouts from forked states, rewards, advantages."""
        self.actor.eval()
        nsp, before = self.settings.nsp, self.actor.forward_tokens
        longest = max(documents.lengths)
        parts: list[tuple[RolloutBatch, dict[str, Tensor]]] = []
        for rows in _parts(range(len(documents)), self.settings.micro_batch_size):
            rollouts: RolloutBatch = self.actor(
                mode="rollout",
                documents=take(documents, rows),
                nsp=nsp,
                draws=RolloutDraws.of(self.settings.seed, index, [ids[row] for row in rows], nsp),
                snapshots=snapshot_count(nsp.chunks, longest),
            )
            parts.append((rollouts, self.reward(rollouts)))
        self.compute.rollout_tokens += self.actor.forward_tokens - before
        rewards = {name: torch.cat([scores[name] for _, scores in parts]) for name in parts[0][1]}
        return Written(
            torch.cat([part.positions for part, _ in parts]),
            torch.cat([part.tokens for part, _ in parts]),
            torch.cat([part.log_probs for part, _ in parts]),
            rewards,
            group_standardise(rewards["rewards"], nsp.group, divide_by_std=self.settings.divide_by_std),
            torch.cat([part.entropy_mean for part, _ in parts]),
            torch.cat([part.entropy_selected for part, _ in parts]),
        )

    def gradients(self, documents: Documents, written: Written | None) -> tuple[list[Tensor], dict[str, float]]:
        """Of one mini-batch's loss with respect to ``self.parameters``, and its metrics. Changes no weight."""
        self.actor.train()
        before = self.actor.forward_tokens
        predicted = _predicted(documents)
        rollouts = 0 if written is None else written.advantages.numel()
        total = [torch.zeros_like(parameter) for parameter in self.parameters]
        metrics: dict[str, float] = {"actor/loss": 0.0}
        for rows in _parts(range(len(documents)), self.settings.micro_batch_size):
            part = take(documents, rows)
            chosen = None if written is None else written.rows(rows)
            output = self.actor(
                mode="update",
                documents=part,
                branches=None if chosen is None else Branches(chosen.positions, chosen.tokens),
                nsp=self.settings.nsp,
            )
            loss, shares = refine_objective(
                output["ntp_loss_sum"],
                _predicted(part),
                output.get("log_probs"),
                None if chosen is None else chosen.log_probs.flatten(0, 2),
                None if chosen is None else chosen.advantages.flatten(),
                policy_loss=self.policy_loss,
                rl_coef=self.settings.loss.rl_coef if chosen is not None else 0.0,
                sft_coef=self.settings.loss.sft_coef,
                global_tokens=predicted,
                global_rollouts=rollouts,
            )
            for place, gradient in zip(
                total, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    place += gradient
            metrics["actor/loss"] += loss.item()
            for name, value in shares.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
        self.compute.trained_tokens += self.actor.forward_tokens - before
        if written is not None:
            metrics.update(_reward_metrics(written, self.settings.nsp.group))
        return total, metrics

    def _update(self, documents: Documents, written: Written | None) -> dict[str, float]:
        gradients, metrics = self.gradients(documents, written)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite (norm {norm}) at step {self.compute.steps + 1}")
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        self.compute.steps += 1
        metrics["actor/grad_norm"] = norm
        return metrics


def _parts(rows: Sequence[int], size: int | None) -> list[Sequence[int]]:
    size = size or len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _predicted(documents: Documents) -> int:
    first = documents.learn_from or (1,) * len(documents)
    return sum(length - start for length, start in zip(documents.lengths, first, strict=True))


def _reward_metrics(written: Written, group: str) -> dict[str, float]:
    rewards = written.rewards
    return {
        "nsp/reward/mean": rewards["rewards"].mean().item(),
        "nsp/reward/std": rewards["rewards"].std(unbiased=False).item(),
        "nsp/reward_cosine/mean": rewards["reward_cosine"].mean().item(),
        "nsp/reward_binary/mean": rewards["reward_binary"].mean().item(),
        "nsp/group_zero_std": group_zero_std_share(rewards["rewards"], group),
        "nsp/entropy_selected/mean": written.entropy_selected.mean().item(),
    }
