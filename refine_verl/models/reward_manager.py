"""Rewards where the hidden states are: inside the worker. Only numbers leave it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from refine_verl.models.rollouts import RolloutBatch
from refine_verl.nsp import get_reward


class HiddenStateRewardManager:
    """Scores rollouts against the real continuation with a reward of ``nsp.rewards`` (Eq. 9, 11, 12 or a user's).

    Other rewards, by default cosine and binary, are always reported beside the one that trains.
    """

    def __init__(self, reward: str, reported: Iterable[str] = ("cosine", "binary")) -> None:
        """Args:
        reward: a registered name or the import path of a function.
        reported: registered names.
        """
        self._rewards = {
            "rewards": get_reward(reward),
            **{f"reward_{name}": get_reward(name) for name in reported},
        }

    def __call__(self, rollouts: RolloutBatch) -> dict[str, Tensor]:
        """Returns: ``rewards`` and ``reward_<name>`` of each reported one, float32 [N, c, n]."""
        shape = rollouts.tokens.shape[:3]
        inputs = rollouts.reward_inputs()
        return {name: function(inputs).float().view(shape) for name, function in self._rewards.items()}
