"""The training objective: PPO-clip on rollouts plus next-token cross-entropy (paper, Eq. 2, 10 and Sec. 3.2).

Denominators are those of the whole mini-batch (all ranks, all micro-batches), given by the caller. A
micro-batch's loss is then its share of the mini-batch's loss: shares add up to the same value and gradient
however the mini-batch is split. Whether the gradient of the rollouts flows through the prefix
(`grad_scope`) is decided where the state is forked, not here.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from refine_verl.nsp.entropy import accumulation_dtype
from refine_verl.nsp.registry import unknown_choice
from refine_verl.nsp.sampling import scaled_log_softmax

GROUPS = ("sequence", "position")
"""What is compared with each other: all rollouts of a document, or those of one position."""

# exp() of a larger difference of log-probs overflows or loses all meaning; the same bound as verl.
_MAX_LOG_RATIO = 20.0


class PolicyLoss(Protocol):
    """A policy loss as `refine_objective` calls it."""

    def __call__(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        global_rollouts: int,
    ) -> tuple[Tensor, dict[str, Any]]:
        """All tensors `[R, k]`.

        Returns:
            The sum over rollouts of their mean loss per token, divided by `global_rollouts`; and metrics,
            each a mean over the tokens of this call.
        """


def gather_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of `tokens` under `softmax(logits / temperature)`, differentiable.

    Args:
        logits: `[..., V]`, any floating dtype.
        tokens: int64 `[...]`.
        temperature: that of the rollout; 0 (greedy) counts as 1, as in `sample_from_logits`.

    Returns:
        `[...]`, float32 (float64 for float64 logits).
    """
    return scaled_log_softmax(logits, temperature).gather(-1, tokens[..., None])[..., 0]


def ppo_clip_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    global_rollouts: int | None = None,
    clip_ratio: float = 0.2,
    clip_ratio_low: float | None = None,
    clip_ratio_high: float | None = None,
    clip_ratio_c: float | None = 3.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss, -J of Eq. 10: `max(-A rho, -A clip(rho, 1-eps, 1+eps))`, `rho = exp(new - old)`.

    Args:
        log_probs: `[R, k]`, under the policy being trained.
        old_log_probs: `[R, k]`, under the policy that wrote the rollouts.
        advantages: `[R, k]` or `[R]` (one per rollout).
        mask: `[R, k]`, which tokens count; None counts all.
        global_rollouts: rollouts of the whole mini-batch with at least one counted token; None takes those
            of this call.
        clip_ratio: epsilon; `clip_ratio_low` and `clip_ratio_high` replace it on one side.
        clip_ratio_c: for A < 0 the loss is at most `-A * clip_ratio_c` (dual clip); None switches that off.

    Returns:
        loss: scalar, (sum over rollouts of the mean over the rollout's counted tokens) / `global_rollouts`.
        metrics: detached scalars `actor/ppo_kl`, `actor/pg_clipfrac`, `actor/pg_clipfrac_lower`, each a
            mean over the counted tokens of this call (0 where there is none).
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    counted = torch.ones_like(log_probs) if mask is None else mask.to(log_probs.dtype)
    log_ratio = (log_probs - old_log_probs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    low = clip_ratio if clip_ratio_low is None else clip_ratio_low
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    losses = torch.maximum(plain, clipped)
    lower = torch.zeros_like(losses, dtype=torch.bool)
    if clip_ratio_c is not None:
        bound = -advantages * clip_ratio_c
        lower = (advantages < 0) & (losses > bound)
        losses = torch.where(advantages < 0, torch.minimum(losses, bound), losses)

    tokens = counted.sum(dim=-1)
    if global_rollouts is None:
        global_rollouts = int((tokens > 0).sum())
    loss = ((losses * counted).sum(dim=-1) / tokens.clamp(min=1)).sum() / max(global_rollouts, 1)

    def mean(values: Tensor) -> Tensor:
        return ((values * counted).sum() / tokens.sum().clamp(min=1)).detach()

    return loss, {
        "actor/ppo_kl": mean(-log_ratio),
        "actor/pg_clipfrac": mean((clipped > plain).to(counted.dtype)),
        "actor/pg_clipfrac_lower": mean(lower.to(counted.dtype)),
    }


def refine_objective(
    ntp_loss_sum: Tensor,
    ntp_token_count: int,
    log_probs: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    advantages: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    policy_loss: PolicyLoss = ppo_clip_loss,
    rl_coef: float,
    sft_coef: float,
    global_tokens: int,
    global_rollouts: int,
    dp_size: int = 1,
    balance_loss_sum: Tensor | None = None,
    counted: int | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """A micro-batch's share of `lambda_RL * L_PPO + lambda_SFT * L_NTP` (Eq. 2, 10; Sec. 3.2).

    L_PPO is the mean over the mini-batch's rollouts of the mean over their k tokens; L_NTP is the mean over
    the mini-batch's predicted tokens (`x_1 ... x_{T-1}` of each document) of their cross-entropy.

    Args:
        ntp_loss_sum: scalar, sum of -log p(x_{j+1} | x_0..x_j) over this micro-batch (Eq. 2).
        ntp_token_count: how many terms that sum has.
        log_probs, old_log_probs: `[R, k]`; None for a micro-batch (or a baseline) without rollouts.
        advantages: `[R]` or `[R, k]`.
        mask: `[R, k]`; None counts every token. A rollout without a counted token does not count.
        policy_loss: see `PolicyLoss`.
        rl_coef, sft_coef: lambda_RL, lambda_SFT.
        global_tokens, global_rollouts: counts over the whole mini-batch, all ranks and micro-batches.
        dp_size: number of ranks over which gradients will be *averaged*; 1 if they are summed.
        balance_loss_sum: scalar, a weighted loss of the model's own, times ``ntp_token_count``; None: it has none.
        counted: how many rollouts have a counted token; None: the host looks, and waits for the device.

    Returns:
        loss: scalar to call `backward` on, multiplied by `dp_size` to undo the averaging.
        metrics: `actor/ntp_loss`, `actor/pg_loss` and those of `policy_loss`, not multiplied by `dp_size`.
            Each is a share too: the *sum* over micro-batches and ranks is the mini-batch's value.

    Raises:
        ValueError: the micro-batch claims more tokens or rollouts than the mini-batch has.
    """
    rollouts = 0 if log_probs is None else log_probs.shape[0]
    if log_probs is not None and mask is not None:
        rollouts = int(mask.any(dim=-1).sum()) if counted is None else counted
    _check_counts((ntp_token_count, rollouts), (global_tokens, global_rollouts))
    ntp_loss = ntp_loss_sum / max(global_tokens, 1)
    loss = sft_coef * ntp_loss  # with a coefficient of 0, too, S stays in the graph: FSDP2 and shared casts rely on it
    metrics: dict[str, Any] = {"actor/ntp_loss": ntp_loss.detach()}
    if balance_loss_sum is not None:
        balance_loss = balance_loss_sum / max(global_tokens, 1)
        loss = loss + balance_loss
        metrics["actor/balance_loss"] = balance_loss.detach()
    if log_probs is not None:
        if old_log_probs is None or advantages is None:
            raise ValueError("log_probs need old_log_probs and advantages")
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand_as(log_probs)
        if mask is None:
            mask = torch.ones_like(log_probs, dtype=torch.bool)
        pg_loss, pg_metrics = policy_loss(log_probs, old_log_probs, advantages, mask, global_rollouts=global_rollouts)
        loss = loss + rl_coef * pg_loss
        share = rollouts / max(global_rollouts, 1)
        metrics["actor/pg_loss"] = pg_loss.detach()
        metrics.update({name: value * share for name, value in pg_metrics.items()})
    return loss * dp_size, metrics


def _check_counts(own: tuple[int, int], whole: tuple[int, int]) -> None:
    if own[0] > whole[0] or own[1] > whole[1]:
        raise ValueError(
            f"a micro-batch of {own[0]} predicted tokens and {own[1]} rollouts cannot be part of a mini-batch of "
            f"{whole[0]} and {whole[1]}: the latter must count all ranks and micro-batches"
        )


def _grouped(rewards: Tensor, group: str) -> Tensor:
    if group not in GROUPS:
        raise unknown_choice("group", group, GROUPS)
    if rewards.dim() != 3:
        raise ValueError(f"rewards must have shape [B, c, n], got {list(rewards.shape)}")
    return rewards.flatten(1) if group == "sequence" else rewards.flatten(0, 1)


def group_standardise(
    rewards: Tensor,
    group: str = "sequence",
    eps: float = 1e-6,
    divide_by_std: bool = True,
    counted: Tensor | None = None,
) -> Tensor:
    """Advantages: rewards minus their group's mean, over its unbiased standard deviation plus `eps` (GRPO).

    The same numbers as verl's `grpo` estimator. A group of one has no mean to compare with and keeps its
    raw reward (over 1 + `eps`); a group of equal rewards gets 0.

    Args:
        rewards: `[B, c, n]`, any floating dtype; computed in float64.
        group: `sequence` (c*n rollouts of a document) or `position` (n rollouts of a position).
        eps: added to the standard deviation.
        divide_by_std: False only subtracts the mean.
        counted: bool `[B, c, n]`, which of them there are; None: all.

    Returns:
        `[B, c, n]`, dtype of `rewards`, 0 where nothing is counted.

    Raises:
        ValueError: unknown group or wrong shape.
    """
    values = _grouped(rewards, group).to(torch.float64)
    if counted is not None:
        advantages = _standardised(values, _grouped(counted, group), eps, divide_by_std)
        return advantages.reshape(rewards.shape).to(rewards.dtype)
    if values.shape[1] == 1:
        mean, std = torch.zeros_like(values), torch.ones_like(values)
    else:
        mean, std = values.mean(dim=1, keepdim=True), values.std(dim=1, keepdim=True)
    advantages = values - mean
    if divide_by_std:
        advantages = advantages / (std + eps)
    return advantages.reshape(rewards.shape).to(rewards.dtype)


def _standardised(values: Tensor, counted: Tensor, eps: float, divide_by_std: bool) -> Tensor:
    """`group_standardise` of rows `[G, m]` that do not count everywhere."""
    size = counted.sum(dim=1, keepdim=True)
    alone = size <= 1
    values = values.masked_fill(~counted, 0)
    mean = (values.sum(dim=1, keepdim=True) / size.clamp(min=1)).masked_fill(alone, 0)
    off = (values - mean).masked_fill(~counted, 0)
    if not divide_by_std:
        return off
    std = (off.square().sum(dim=1, keepdim=True) / (size - 1).clamp(min=1)).sqrt().masked_fill(alone, 1)
    return off / (std + eps)


def group_ids(batch: int, chunks: int, rollouts: int, group: str = "sequence") -> np.ndarray:
    """Group of each rollout, in the order of `rewards.flatten()`: int64 `[B*c*n]`, verl's `index`.

    Raises:
        ValueError: unknown group.
    """
    if group not in GROUPS:
        raise unknown_choice("group", group, GROUPS)
    size = chunks * rollouts if group == "sequence" else rollouts
    return np.arange(batch * chunks * rollouts, dtype=np.int64) // size


def group_zero_std_share(rewards: Tensor, group: str = "sequence", counted: Tensor | None = None) -> float:
    """Share of groups whose rewards are all equal: their advantage is 0, they teach nothing.

    A group of one never counts, since it keeps its raw reward.

    Args:
        rewards: `[B, c, n]`.
        group: `sequence` or `position`.
        counted: bool `[B, c, n]`, which of them there are; None: all.

    Raises:
        ValueError: unknown group or wrong shape.
    """
    values = _grouped(rewards, group)
    if counted is not None:
        there = _grouped(counted, group)
        several = there.sum(dim=1) > 1
        largest = values.masked_fill(~there, -torch.inf).amax(dim=1)
        equal = (largest == values.masked_fill(~there, torch.inf).amin(dim=1)) & several
        return (equal.sum() / (there.sum(dim=1) > 0).sum().clamp(min=1)).item()
    if values.shape[0] == 0 or values.shape[1] == 1:
        return 0.0
    return (values.amax(dim=1) == values.amin(dim=1)).to(accumulation_dtype(values)).mean().item()
