"""How much a rollout resembles the real continuation (paper, Eq. 9, 11, 12; edit distance), and a registry for more.

A reward is a function `RewardInputs -> float tensor`: `[R, k]`, what each token earned, or `[R]`, one number per
rollout. What the tokens of a rollout earned is averaged (Eq. 9, 11); several terms, in a tuple, add up (Eq. 12). What a
token earned depends on it and the tokens before it. A run names a function of yours by its import path,
`my_package.my_module.my_reward`, which every worker can find, or by the name that `@register_reward("name")` gives it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_verl.nsp.entropy import accumulation_dtype
from refine_verl.nsp.lengths import counted_tokens
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
        lengths: int64 `[R]`, tokens that belong to each rollout, where that is not k for all; what a function says
            of those behind them is not counted.

    Raises:
        ValueError: the shapes do not fit together.
    """

    predicted_hidden: Tensor
    target_hidden: Tensor
    predicted_tokens: Tensor
    target_tokens: Tensor
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        hidden, tokens = self.predicted_hidden.shape, self.predicted_tokens.shape
        fits = len(hidden) == 3 and hidden[:2] == tokens
        fits = fits and (self.lengths is None or self.lengths.shape == tokens[:1])
        if not fits or self.target_hidden.shape != hidden or self.target_tokens.shape != tokens:
            given = {name: value for name, value in vars(self).items() if value is not None}
            raise ValueError(
                "expected hidden states [R, k, d], tokens [R, k] and lengths [R], got "
                + ", ".join(f"{name} {list(value.shape)}" for name, value in given.items())
            )


Earned = Tensor | tuple[Tensor, ...]
"""`[R, k]` or `[R]`, or several of them that add up."""
RewardFunction = Callable[[RewardInputs], Earned]
CheckedReward = Callable[[RewardInputs], Tensor]

REWARDS: Registry[RewardFunction] = Registry("reward")
register_reward = REWARDS.register


@register_reward("cosine")
def cosine_reward(inputs: RewardInputs) -> Tensor:
    """cos(h_pred, h_gt) of each token, whose mean is Eq. 9. `[R, k]` in [-1, 1]; a zero vector scores 0."""
    return _cosines(inputs)


@register_reward("binary")
def binary_reward(inputs: RewardInputs) -> Tensor:
    """1 for each token that is exactly right in its place, else 0; the mean is Eq. 11. float32 `[R, k]`."""
    return _right(inputs)


@register_reward("hybrid")
def hybrid_reward(inputs: RewardInputs) -> tuple[Tensor, Tensor]:
    """`cosine_reward` and `binary_reward`, which add up (Eq. 12)."""
    return _cosines(inputs), _right(inputs)


@register_reward("edit")
def edit_reward(inputs: RewardInputs) -> Tensor:
    """`edit_gains`, whose mean is 1 - d / k, with d the edit distance of the two sequences. float32 `[R, k]`.

    Unlike `binary_reward` it forgives a token that is left out or put in: what follows need not be in its place.
    """
    return edit_gains(inputs.predicted_tokens, inputs.target_tokens, inputs.lengths)


def edit_gains(predicted: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    """How much each token brings a rollout nearer to the real continuation.

    With d(j) the edit distance (insertions, deletions, substitutions) of the first j written tokens from the whole
    continuation, token j earns d(j-1) - d(j): 1, 0 or -1. As d(0) = k, all k of them earn k - d(k).

    Args:
        predicted, target: int `[R, k]`.
        lengths: int64 `[R]`, tokens of each continuation; None: all k.

    Returns:
        float32 `[R, k]`, on their device, without waiting for it.
    """
    width = target.shape[1]
    places = torch.arange(width + 1, device=target.device)
    row = places.expand(len(target), -1)  # from no token to the first 0 ... k of the continuation
    whole = torch.full_like(row[:, :1], width) if lengths is None else lengths[:, None]
    distances = [row.gather(1, whole)[:, 0]]
    for j in range(predicted.shape[1]):
        replaced = row[:, :-1] + (predicted[:, j : j + 1] != target)
        kept = torch.cat([row[:, :1] + 1, torch.minimum(row[:, 1:] + 1, replaced)], dim=1)
        row = (kept - places).cummin(dim=1).values + places  # the rest is put in behind what is best before
        distances.append(row.gather(1, whole)[:, 0])
    return torch.stack(distances, dim=1).diff(dim=1).neg().float()


def _cosines(inputs: RewardInputs) -> Tensor:
    dtype = accumulation_dtype(inputs.predicted_hidden)
    return F.cosine_similarity(inputs.predicted_hidden.to(dtype), inputs.target_hidden.to(dtype), dim=-1)


def _right(inputs: RewardInputs) -> Tensor:
    return (inputs.predicted_tokens == inputs.target_tokens).float()


def get_reward(name: str, per_token: bool = False) -> CheckedReward:
    """The reward called `name`, or the one found at an import path.

    Args:
        name: a registered name, or `package.module.function` or `package.module:function`.
        per_token: give what each token earned, not their mean.

    Returns:
        The function, with its result checked at every call: ValueError or TypeError, naming the function, unless it
        is a tensor of shape `[R, k]` or, not with `per_token`, `[R]`, or a tuple of those, and finite wherever the
        inputs are. It returns `[R]`, with `per_token` `[R, k]`, detached and floating.

    Raises:
        ValueError: no such reward (with the nearest known name), module or function, or it cannot be called.
    """
    return _checked(REWARDS.find(name), name, per_token)


def try_reward(name: str, length: int, per_token: bool) -> None:
    """Call the reward called `name` for two made-up rollouts of `length` tokens: one right in every place, one in none.

    Args:
        per_token: whether it has to say what each token earned.

    Raises:
        ValueError, TypeError: what it returns cannot be used, see `get_reward`. What the function itself raises is not
            its fault, since the input is made up; every call in a run is checked again.
    """
    tokens = torch.arange(2 * length).view(2, length)
    hidden = torch.linspace(-1, 1, 2 * length * 8).view(2, length, 8)
    inputs = RewardInputs(
        predicted_hidden=torch.stack([hidden[0], -hidden[1]]),
        target_hidden=hidden,
        predicted_tokens=tokens[[0, 0]],
        target_tokens=tokens,
    )
    function = REWARDS.find(name)
    try:
        inspect.signature(function).bind(inputs)
    except TypeError as error:
        raise TypeError(f"reward {name!r} cannot be called with one argument, RewardInputs ({error})") from error
    except ValueError:  # one written in C says nothing of its arguments
        pass
    try:
        earned = function(inputs)
    except Exception:  # a user's function may need the model's own width
        return
    _verified(earned, inputs, f"reward {name!r} ({path_of(function)})", per_token)


def _checked(function: RewardFunction, name: str, per_token: bool) -> CheckedReward:
    # those of this file are finite where the model's numbers are
    ours = getattr(function, "__globals__", None) is globals()

    @functools.wraps(function)
    def checked(inputs: RewardInputs) -> Tensor:
        return _verified(function(inputs), inputs, f"reward {name!r} ({path_of(function)})", per_token, finite=ours)

    return checked


def _verified(earned: Earned, inputs: RewardInputs, where: str, per_token: bool, finite: bool = False) -> Tensor:
    """The sum of all terms: `[R]`, or `[R, k]` with `per_token`.

    ``finite``: it is known to be. To look, the host waits for the device.
    """
    terms = earned if isinstance(earned, tuple) and earned else (earned,)
    reward = sum(_term(term, inputs, where, per_token) for term in terms)
    assert isinstance(reward, Tensor)
    if finite:
        return reward
    # where the model's own numbers are not finite, the reward function is not to blame
    hidden = (inputs.predicted_hidden, inputs.target_hidden)
    if not torch.isfinite(reward).all() and all(torch.isfinite(part).all() for part in hidden):
        bad = int((~torch.isfinite(reward).flatten(1).all(dim=1) if per_token else ~torch.isfinite(reward)).sum())
        raise ValueError(f"{where} returned NaN or infinity for {bad} of {len(reward)} rollouts")
    return reward


def mean_per_rollout(earned: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean `[R]` of what the tokens of each rollout earned, `[R, k]`, 0 behind its end (`lengths` `[R]`)."""
    return earned.mean(dim=-1) if lengths is None else earned.sum(dim=-1) / lengths


def _term(term: object, inputs: RewardInputs, where: str, per_token: bool) -> Tensor:
    count, length = inputs.predicted_tokens.shape
    lengths = inputs.lengths
    wanted = f"[{count}, {length}], what each token earned"
    if not isinstance(term, Tensor):
        raise TypeError(f"{where} returned a {type(term).__name__}; expected a tensor of shape {wanted}")
    if (per_token or lengths is not None) and term.shape == (count,):
        raise ValueError(f"{where} returned shape [{count}], one number per rollout; expected {wanted}")
    if term.shape not in ((count,), (count, length)):
        otherwise = "" if per_token else f", or [{count}], one number per rollout"
        raise ValueError(f"{where} returned shape {list(term.shape)}; expected {wanted}{otherwise}")
    term = term.detach() if term.is_floating_point() else term.float()
    if lengths is not None:
        term = term.masked_fill(~counted_tokens(lengths, length), 0)
    return term if per_token or term.dim() == 1 else mean_per_rollout(term, lengths)
