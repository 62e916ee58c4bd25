"""Numbers that describe rewards and rollouts, by their names in ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from refine_verl.nsp.advantage import returns_at_places
from refine_verl.nsp.objective import group_zero_std_share


def reward_metrics(name: str, rewards: Tensor, group: str = "sequence") -> dict[str, float]:
    """``<name>/reward/mean``, ``std`` (unbiased; 0 for a single one), ``min``, ``max`` and ``<name>/group_zero_std``.

    Args:
        name: what was rewarded, ``nsp`` for rollouts.
        rewards: `[B, c, n]`.
        group: which of them are compared with each other, see `group_standardise`.
    """
    return {
        f"{name}/reward/mean": rewards.mean().item(),
        f"{name}/reward/std": rewards.std().item() if rewards.numel() > 1 else 0.0,
        f"{name}/reward/min": rewards.min().item(),
        f"{name}/reward/max": rewards.max().item(),
        f"{name}/group_zero_std": group_zero_std_share(rewards, group),
    }


def rollout_metrics(rollouts: Mapping[str, Tensor], group: str) -> dict[str, float]:
    """Everything that is reported of the rollouts of a batch.

    Args:
        rollouts: ``rewards``, ``reward_cosine`` and ``reward_binary`` `[B, c, n]`, ``entropy_mean`` `[B]` and
            ``entropy_selected`` `[B, c]`; with `credit=token` also ``token_rewards`` `[B, c, n, k]`; where they differ
            ``rollout_lengths`` `[B, c]`.
        group: as in `reward_metrics`.
    """
    lengths = rollouts.get("rollout_lengths", None)
    return {
        **reward_metrics("nsp", rollouts["rewards"], group),
        **({} if lengths is None else {"nsp/rollout_length/mean": lengths.float().mean().item()}),
        "nsp/group_zero_std": equal_outcomes_share(rollouts, group),
        "nsp/reward_cosine/mean": rollouts["reward_cosine"].mean().item(),
        "nsp/reward_binary/mean": rollouts["reward_binary"].mean().item(),
        "nsp/entropy/mean": rollouts["entropy_mean"].mean().item(),
        "nsp/entropy/selected_mean": rollouts["entropy_selected"].mean().item(),
    }


def equal_outcomes_share(rollouts: Mapping[str, Tensor], group: str) -> float:
    """Share of groups that teach nothing: of equal rewards or, with ``token_rewards``, of equal returns at a place."""
    if rollouts.get("token_rewards", None) is None:
        return group_zero_std_share(rollouts["rewards"], group)
    shares = [group_zero_std_share(returns, group, counted) for returns, counted in returns_at_places(rollouts, group)]
    return sum(shares) / len(shares)
