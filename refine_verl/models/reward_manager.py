"""Rewards where the hidden states are: inside the worker. Only numbers leave it."""

from __future__ import annotations

from torch import Tensor

from refine_verl.models.rollouts import RolloutBatch
from refine_verl.nsp import get_reward


class HiddenStateRewardManager:
    """Scores rollouts against the real continuation with a reward of ``nsp.rewards`` (Eq. 9, 11, 12 or a user's).

    Cosine and binary rewards are always reported beside the one that trains.
    """

    def __init__(self, reward: str) -> None:
        """Args:
        reward: a registered name or the import path of a function.
        """
        self._reward = get_reward(reward)
        self._reported = {"reward_cosine": get_reward("cosine"), "reward_binary": get_reward("binary")}

    def __call__(self, rollouts: RolloutBatch) -> dict[str, Tensor]:
        """Returns: ``rewards``, ``reward_cosine`` and ``reward_binary``, each float32 [N, c, n]."""
        shape = rollouts.tokens.shape[:3]
        inputs = rollouts.reward_inputs()
        scores = {"rewards": self._reward, **self._reported}
        return {name: function(inputs).float().view(shape) for name, function in scores.items()}
