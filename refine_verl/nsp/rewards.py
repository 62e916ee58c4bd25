"""How much a rollout resembles the real continuation (paper, Eq. 9, 11, 12), and a registry for more rewards.

A reward is a function `RewardInputs -> float tensor [R]`. A run names one of yours by its import path,
`my_package.my_module.my_reward`, which every worker can find, or by the name that `@register_reward("name")` gives it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_verl.nsp.entropy import accumulation_dtype
from refine_verl.nsp.registry import Registry, path_of


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardInputs:
    """What a reward may look at, for R rollouts of k tokens.

    Attributes:
        predicted_hidden: `[R, k, d]`, h_pred(t+1) ... h_pred(t+k): hidden states after the final norm at the
            generated tokens (Eq. 7).
        target_hidden: `[R, k, d]`, h_gt: the same at the real tokens, from the pass over the document
            (Eq. 8).
        predicted_tokens: int `[R, k]`.
        target_tokens: int `[R, k]`.

    Raises:
        ValueError: the shapes do not fit together.
    """

    predicted_hidden: Tensor
    target_hidden: Tensor
    predicted_tokens: Tensor
    target_tokens: Tensor

    def __post_init__(self) -> None:
        hidden, tokens = self.predicted_hidden.shape, self.predicted_tokens.shape
        fits = len(hidden) == 3 and hidden[:2] == tokens
        if not fits or self.target_hidden.shape != hidden or self.target_tokens.shape != tokens:
            raise ValueError(
                "expected hidden states [R, k, d] and tokens [R, k], got "
                + ", ".join(f"{name} {list(value.shape)}" for name, value in vars(self).items())
            )


RewardFunction = Callable[[RewardInputs], Tensor]

REWARDS: Registry[RewardFunction] = Registry("reward")
register_reward = REWARDS.register


@register_reward("cosine")
def cosine_reward(inputs: RewardInputs) -> Tensor:
    """Mean over the k tokens of cos(h_pred, h_gt) (Eq. 9). `[R]` in [-1, 1]; a zero vector scores 0."""
    dtype = accumulation_dtype(inputs.predicted_hidden)
    predicted, target = inputs.predicted_hidden.to(dtype), inputs.target_hidden.to(dtype)
    return F.cosine_similarity(predicted, target, dim=-1).mean(dim=-1)


@register_reward("binary")
def binary_reward(inputs: RewardInputs) -> Tensor:
    """Share of the k tokens that are exactly right, place by place (Eq. 11). float32 `[R]` in [0, 1]."""
    return (inputs.predicted_tokens == inputs.target_tokens).float().mean(dim=-1)


@register_reward("hybrid")
def hybrid_reward(inputs: RewardInputs) -> Tensor:
    """Sum of `cosine_reward` and `binary_reward` (Eq. 12). `[R]` in [-1, 2]."""
    return cosine_reward(inputs) + binary_reward(inputs)


def get_reward(name: str) -> RewardFunction:
    """The reward called `name`, or the one found at an import path.

    Args:
        name: a registered name, or `package.module.function` or `package.module:function`.

    Returns:
        The function, with its result checked at every call: ValueError or TypeError, naming the function,
        unless it is a tensor of shape `[R]` that is finite wherever the inputs are. The result is detached
        and floating.

    Raises:
        ValueError: no such reward (with the nearest known name), module or function, or it cannot be called.
    """
    return _checked(REWARDS.find(name), name)


def _checked(function: RewardFunction, name: str) -> RewardFunction:
    @functools.wraps(function)
    def checked(inputs: RewardInputs) -> Tensor:
        reward = function(inputs)
        where = f"reward {name!r} ({path_of(function)})"
        count = inputs.predicted_tokens.shape[0]
        if not isinstance(reward, Tensor):
            raise TypeError(f"{where} returned a {type(reward).__name__}; expected a tensor of shape [{count}]")
        if reward.shape != (count,):
            raise ValueError(f"{where} returned shape {list(reward.shape)}; expected [{count}], one number per rollout")
        reward = reward.detach() if reward.is_floating_point() else reward.float()
        # where the model's own numbers are not finite, the reward function is not to blame
        hidden = (inputs.predicted_hidden, inputs.target_hidden)
        if not torch.isfinite(reward).all() and all(torch.isfinite(part).all() for part in hidden):
            bad = int((~torch.isfinite(reward)).sum())
            raise ValueError(f"{where} returned NaN or infinity for {bad} of {count} rollouts")
        return reward

    return checked
