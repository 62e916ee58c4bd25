"""Rewards where the hidden states are: inside the worker. Only numbers leave it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from refine_verl.models.rollouts import RolloutBatch
from refine_verl.nsp import get_reward
from refine_verl.nsp.rewards import mean_per_rollout


class HiddenStateRewardManager:
    """Scores rollouts against the real continuation with a reward of ``nsp.rewards`` (Eq. 9, 11, 12 or a user's).

    Other rewards, by default cosine and binary, are always reported beside the one that trains.
    """

    def __init__(self, reward: str, reported: Iterable[str] = ("cosine", "binary"), credit: str = "rollout") -> None:
        """Args:
        reward: a registered name or the import path of a function.
        reported: registered names.
        credit: with ``token``, also tell what each token earned.
        """
        self._per_token = credit == "token"
        self._trains = get_reward(reward, self._per_token)
        self._reported = {f"reward_{name}": get_reward(name) for name in reported}

    def __call__(self, rollouts: RolloutBatch) -> dict[str, Tensor]:
        """Returns: ``rewards`` and ``reward_<name>`` of each reported one, float32 [N, c, n]; ``token_rewards``
        [N, c, n, k], whose mean ``rewards`` is, with ``credit=token``.
        """
        shape = rollouts.tokens.shape
        inputs = rollouts.reward_inputs()
        trains = self._trains(inputs).float()
        scores = {"rewards": mean_per_rollout(trains, inputs.lengths) if self._per_token else trains}
        scores.update({name: function(inputs).float() for name, function in self._reported.items()})
        scores = {name: values.view(shape[:3]) for name, values in scores.items()}
        return {**scores, "token_rewards": trains.view(shape)} if self._per_token else scores
