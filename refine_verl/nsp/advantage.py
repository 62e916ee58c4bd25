"""Advantages by an estimator of verl's kind: a function of token rewards, a mask and groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from refine_verl.config import ConfigError, NSPSettings
from refine_verl.nsp.objective import group_ids

Estimator = Callable[..., tuple[Tensor, Tensor]]
"""As in verl's registry (``verl.trainer.ppo.core_algos.ADV_ESTIMATOR_REGISTRY``)."""


class Compare(Protocol):
    """What compares outcomes with each other, such as `group_standardise`."""

    def __call__(self, outcomes: Tensor, /, *, counted: Tensor | None) -> Tensor:
        """Advantages `[B, c, n]` of ``outcomes``; ``counted``, a bool `[B, c, n]`, says which there are, None: all."""


def token_returns(earned: Tensor, lengths: Tensor | None = None) -> Tensor:
    """What each token and those after it earned, over k: a token has no part in what came before it.

    Args:
        earned: `[..., k]`, any floating dtype, 0 behind the end of a rollout; added up in float64.
        lengths: int64 `[...]`, tokens of each rollout, taken for k; None: all k.

    Returns:
        `[..., k]`, dtype of `earned`; the first is the rollout's reward.
    """
    number = earned.shape[-1] if lengths is None else lengths[..., None]
    return (earned.double().flip(-1).cumsum(-1).flip(-1) / number).to(earned.dtype)


def returns_at_places(rollouts: Mapping[str, Tensor], group: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """For each of the k places the returns `[B, c, n]` of the tokens there, and which are compared (None: all).

    A token that is alone at its place, since all others of its group have ended, has nothing to be compared with: its
    raw return would be no advantage, and it is left out.

    Args:
        rollouts: ``token_rewards`` `[B, c, n, k]` and, where they differ, ``rollout_lengths`` `[B, c]`.
        group: ``sequence`` or ``position``.
    """
    earned, lengths = rollouts["token_rewards"], rollouts.get("rollout_lengths", None)
    if lengths is not None:
        lengths = lengths[..., None].expand(earned.shape[:-1])
    for place, returns in enumerate(token_returns(earned, lengths).unbind(-1)):
        if lengths is None:
            yield returns, None
        else:
            there = lengths > place
            company = there.sum(dim=(1, 2) if group == "sequence" else 2, keepdim=True) > 1
            yield returns, there & company


def token_advantages(rollouts: Mapping[str, Tensor], nsp: NSPSettings, compare: Compare) -> Tensor:
    """One advantage per token.

    Args:
        rollouts: ``rewards`` `[B, c, n]`; with ``credit=token`` what their tokens earned, ``token_rewards``
            `[B, c, n, k]`, and, where they differ, ``rollout_lengths`` `[B, c]`.
        nsp: whose ``credit`` counts.
        compare: with ``credit=token`` it is called once for each of the k places, with the returns of the tokens
            there.

    Returns:
        `[B, c, n, k]`; with ``credit=rollout`` all tokens of a rollout have the same one. 0 for tokens that are not
        compared, see `returns_at_places`.
    """
    if nsp.credit == "rollout":
        advantages = compare(rollouts["rewards"], counted=None)
        return advantages[..., None].expand(*advantages.shape, nsp.longest_rollout).contiguous()
    places = [compare(returns, counted=counted) for returns, counted in returns_at_places(rollouts, nsp.group)]
    return torch.stack(places, dim=-1)


def rollout_advantages(
    estimator: Estimator,
    rewards: Tensor,
    rollout_length: int,
    group: str,
    algorithm: Mapping[str, Any],
    counted: Tensor | None = None,
) -> Tensor:
    """One advantage per outcome.

    Args:
        estimator: what compares rewards.
        rewards: float32 [B, c, n], one outcome per rollout: its reward, or the return of one of its tokens.
        rollout_length: k; the outcome is paid at the last token.
        group: ``sequence`` (all c * n rollouts of a document are compared, as in the paper) or ``position``.
        algorithm: verl's ``algorithm`` section.
        counted: bool [B, c, n], which outcomes there are; the estimator sees no others. None: all.

    Returns:
        float32 [B, c, n], 0 where there is no outcome.

    Raises:
        ConfigError: the estimator gives the tokens of a rollout different advantages (``algorithm.gamma`` < 1, for
            one), though it compares one number of each.
    """
    batch, chunks, rollouts = rewards.shape
    groups, outcomes = group_ids(batch, chunks, rollouts, group), rewards.flatten().cpu()
    there = torch.ones(len(outcomes), dtype=torch.bool) if counted is None else counted.flatten().cpu()
    outcomes, groups = outcomes[there], groups[there.numpy()]
    if not len(outcomes):
        return torch.zeros_like(rewards, dtype=torch.float32)
    lengths = torch.full((len(outcomes),), rollout_length)
    advantages = estimate(estimator, outcomes, lengths, rollout_length, groups, algorithm)
    if not torch.allclose(advantages, advantages[:, :1].expand_as(advantages), rtol=1e-5, atol=1e-7):
        raise ConfigError(
            "algorithm.adv_estimator",
            f"{algorithm['adv_estimator']} (algorithm.gamma={algorithm.get('gamma')}) gives each token of a rollout an "
            "advantage of its own; REFINE compares one number at a time. Use grpo, or gamma=1.",
        )
    every = torch.zeros(rewards.numel())
    every[there] = advantages[:, 0].float()
    return every.view(rewards.shape).to(rewards.device)


def compares_within_documents(
    estimator: Estimator, rollout_length: int, group: str, algorithm: Mapping[str, Any], shape: tuple[int, int]
) -> bool:
    """Whether the advantages of a document, of ``shape`` (c, n), depend on its own rewards only.

    Tried out: rewards of three documents, compared together and one document at a time.
    """
    rewards = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    rest = (rollout_length, group, algorithm)
    together = rollout_advantages(estimator, rewards, *rest)
    alone = torch.cat([rollout_advantages(estimator, row[None], *rest) for row in rewards])
    return torch.allclose(together, alone, rtol=1e-4, atol=1e-6)


def estimate(
    estimator: Estimator,
    rewards: Tensor,
    lengths: Tensor,
    width: int,
    groups: np.ndarray,
    algorithm: Mapping[str, Any],
) -> Tensor:
    """Advantages of R outcomes, each paid at the last of its ``lengths`` tokens: float64 [R, width]."""
    # float64: the mean of equal float32 rewards may be off by one rounding, and a tiny difference over a tiny
    # standard deviation is no small number
    mask = (torch.arange(width) < lengths[:, None]).double()
    token_rewards = torch.zeros_like(mask).scatter(1, lengths[:, None] - 1, rewards.double()[:, None])
    arguments: dict[str, Any] = {
        "token_level_rewards": token_rewards,
        "response_mask": mask,
        "index": groups,
        "norm_adv_by_std_in_grpo": algorithm["norm_adv_by_std_in_grpo"],
        "config": algorithm,
    }
    accepted = inspect.signature(estimator).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        arguments = {name: value for name, value in arguments.items() if name in accepted}
    advantages: Tensor = estimator(**arguments)[0]
    return advantages
