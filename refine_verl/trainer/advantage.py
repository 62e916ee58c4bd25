"""Advantages through verl's estimator registry."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from refine_verl.nsp import group_ids


def compute_advantages(rewards: Tensor, rollout_length: int, group: str, algorithm: DictConfig) -> Tensor:
    """One advantage per rollout from verl's estimator ``algorithm.adv_estimator`` (default ``grpo``).

    Args:
        rewards: float32 [B, c, n], one outcome per rollout.
        rollout_length: k; the outcome is paid at the last token.
        group: ``sequence`` (all c * n rollouts of a document are compared, as in the paper) or ``position``.
        algorithm: verl's ``algorithm`` section.

    Returns:
        float32 [B, c, n].
    """
    batch, chunks, rollouts = rewards.shape
    # float64: the mean of equal float32 rewards may be off by one rounding, and a tiny difference over a tiny
    # standard deviation is no small number
    token_rewards = torch.zeros(rewards.numel(), rollout_length, dtype=torch.float64)
    token_rewards[:, -1] = rewards.flatten().double()
    estimator = get_adv_estimator_fn(algorithm.adv_estimator)
    arguments: dict[str, Any] = {
        "token_level_rewards": token_rewards,
        "response_mask": torch.ones_like(token_rewards),
        "index": group_ids(batch, chunks, rollouts, group),
        "norm_adv_by_std_in_grpo": algorithm.norm_adv_by_std_in_grpo,
        "config": algorithm,
    }
    accepted = inspect.signature(estimator).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        arguments = {name: value for name, value in arguments.items() if name in accepted}
    advantages, _ = estimator(**arguments)
    return advantages[:, 0].view(batch, chunks, rollouts).float()
