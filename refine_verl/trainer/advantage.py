"""Advantages through verl's estimator registry."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from refine_verl.config import ConfigError
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

    Raises:
        ConfigError: the estimator gives the tokens of a rollout different advantages (``algorithm.gamma`` < 1, for
            one), where REFINE's loss has one for all of them.
    """
    batch, chunks, rollouts = rewards.shape
    lengths = torch.full((rewards.numel(),), rollout_length)
    groups = group_ids(batch, chunks, rollouts, group)
    advantages = _estimate(rewards.flatten(), lengths, rollout_length, groups, algorithm)
    if not torch.allclose(advantages, advantages[:, :1].expand_as(advantages), rtol=1e-5, atol=1e-7):
        raise ConfigError(
            "algorithm.adv_estimator",
            f"{algorithm.adv_estimator} (algorithm.gamma={algorithm.get('gamma')}) gives each token of a rollout an "
            "advantage of its own; REFINE has one per rollout. Use grpo, or gamma=1.",
        )
    return advantages[:, 0].view(rewards.shape).float()


def answer_advantages(rewards: Tensor, lengths: Tensor, width: int, algorithm: DictConfig) -> Tensor:
    """Advantages of sampled answers; the answers to one prompt are compared with each other.

    Args:
        rewards: float32 [B, n], the score of each answer.
        lengths: int64 [B, n], its tokens.
        width: A, tokens of the longest answer there could be.
        algorithm: verl's ``algorithm`` section.

    Returns:
        float32 [B, n, A]; what follows the end of an answer has no meaning.
    """
    groups = group_ids(len(rewards), 1, rewards.shape[1], "sequence")
    return _estimate(rewards.flatten(), lengths.flatten(), width, groups, algorithm).view(*rewards.shape, width).float()


def _estimate(rewards: Tensor, lengths: Tensor, width: int, groups: np.ndarray, algorithm: DictConfig) -> Tensor:
    """verl's estimator on R outcomes, each paid at the last of its ``lengths`` tokens: float64 [R, width]."""
    # float64: the mean of equal float32 rewards may be off by one rounding, and a tiny difference over a tiny
    # standard deviation is no small number
    mask = (torch.arange(width) < lengths[:, None]).double()
    token_rewards = torch.zeros_like(mask).scatter(1, lengths[:, None] - 1, rewards.double()[:, None])
    estimator = get_adv_estimator_fn(algorithm.adv_estimator)
    arguments: dict[str, Any] = {
        "token_level_rewards": token_rewards,
        "response_mask": mask,
        "index": groups,
        "norm_adv_by_std_in_grpo": algorithm.norm_adv_by_std_in_grpo,
        "config": algorithm,
    }
    accepted = inspect.signature(estimator).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        arguments = {name: value for name, value in arguments.items() if name in accepted}
    advantages: Tensor = estimator(**arguments)[0]
    return advantages
