"""The policy gradient is unbiased, exactly: all rollouts of a tiny model, weighted with their probabilities."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from refine_verl.config import NSPSettings
from refine_verl.nsp import group_standardise, ppo_clip_loss
from refine_verl.nsp.advantage import token_advantages, token_returns
from refine_verl.nsp.metrics import equal_outcomes_share

VOCABULARY, LENGTH = 5, 3
EVERY = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [125, k]
FIRST, SECOND = torch.cartesian_prod(torch.arange(len(EVERY)), torch.arange(len(EVERY))).T
compare = functools.partial(group_standardise, divide_by_std=False)


def tables(seed: int) -> list[Tensor]:
    """A number for each token after each beginning, float64: [V], [V, V], [V, V, V]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(VOCABULARY,) * places for places in range(1, LENGTH + 1)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def along(numbers: list[Tensor]) -> Tensor:
    """Those of every continuation, [125, k]."""
    return torch.stack([table[tuple(EVERY[:, : place + 1].T)] for place, table in enumerate(numbers)], dim=1)


EARNED = along(tables(1))


def gradient(loss: Tensor, logits: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, logits, retain_graph=True)])


def policy() -> tuple[list[Tensor], Tensor]:
    """Logits, and log-probabilities of every token of every continuation [125, k]."""
    logits = [table.requires_grad_() for table in tables(0)]
    return logits, along([table.log_softmax(dim=-1) for table in logits])


def exact() -> Tensor:
    """Of the expected reward."""
    logits, log_probs = policy()
    return gradient((log_probs.sum(dim=1).exp() * EARNED.mean(dim=1)).sum(), logits)


def expected(advantages: Tensor) -> Tensor:
    """The estimator's expectation: all pairs of rollouts, whose advantages are [125 * 125, 2, k]."""
    logits, log_probs = policy()
    both = torch.stack([log_probs[FIRST], log_probs[SECOND]], dim=1)
    weights = both.detach().sum(dim=(1, 2)).exp()
    weighted = (advantages * weights[:, None, None]).flatten(0, 1)
    rollouts = both.flatten(0, 1)
    loss, _ = ppo_clip_loss(rollouts, rollouts.detach(), weighted, global_rollouts=2)
    # the mean over k tokens, and a baseline with a rollout's own reward in it, which is half of the mean here
    return gradient(-loss, logits) * LENGTH * 2


def pairs(group: str) -> Tensor:
    """What the tokens of every pair earned: two positions of a sequence or two rollouts of a position."""
    earned = torch.stack([EARNED[FIRST], EARNED[SECOND]], dim=1)
    return earned[:, :, None] if group == "sequence" else earned[:, None]


@pytest.mark.parametrize("credit", ["rollout", "token"])
@pytest.mark.parametrize("group", ["sequence", "position"])
def test_the_expectation_is_the_gradient_of_the_expected_reward(group: str, credit: str) -> None:
    earned = pairs(group)
    nsp = NSPSettings(
        chunks=earned.shape[1], rollouts_per_position=2, rollout_length=LENGTH, group=group, credit=credit
    )
    rollouts = {"rewards": earned.mean(dim=-1), "token_rewards": earned}
    advantages = token_advantages(rollouts, nsp, functools.partial(compare, group=group))
    assert advantages.shape == earned.shape
    torch.testing.assert_close(expected(advantages.flatten(1, 2)), exact(), rtol=1e-10, atol=1e-12)


def test_a_baseline_shifted_by_one_token_is_biased() -> None:
    """Negative control: token j compared with the mean return of the tokens after it."""
    returns = token_returns(pairs("position")).flatten(1, 2)
    later = torch.cat([returns[..., 1:], torch.zeros_like(returns[..., :1])], dim=-1).mean(dim=1, keepdim=True)
    off = expected(returns - later) - exact()
    assert off.norm() > 0.1 * exact().norm()


def test_credit_per_token_has_less_variance() -> None:
    """Of single rollouts without a baseline, exactly: what came before a token is noise to it."""
    logits, log_probs = policy()
    chances = log_probs.detach().sum(dim=1).exp()
    rewards = EARNED.mean(dim=1, keepdim=True).expand_as(EARNED)
    spread = []
    for credited in (rewards, token_returns(EARNED)):
        draws = torch.stack([gradient(term, logits) for term in (credited * log_probs).sum(dim=1)])
        spread.append((chances * (draws - exact()).square().sum(dim=1)).sum().item())
    assert spread[1] < 0.9 * spread[0]


def test_returns_by_hand() -> None:
    got = token_returns(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, -3.0]]))
    torch.testing.assert_close(got, torch.tensor([[3.0, 2.0, 2.0], [0.0, 0.0, -3.0]]) / 3)


def test_groups_of_equal_returns_are_counted_by_place() -> None:
    """Equal rewards, but the first token of one and the last of the other earned them."""
    earned = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    rollouts = {"rewards": earned.mean(dim=-1), "token_rewards": earned}
    assert equal_outcomes_share(rollouts, "position") == 0.5
    assert equal_outcomes_share({"rewards": rollouts["rewards"]}, "position") == 1.0
