"""Advantages through verl's registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_adv_estimator_fn, register_adv_est

from refine_verl.config import ConfigError, NSPSettings
from refine_verl.nsp import group_ids, group_standardise
from refine_verl.nsp.advantage import compares_within_documents, estimate, rollout_advantages, token_returns
from refine_verl.preflight.run import check_estimator
from refine_verl.workers.advantage import answer_advantages, compute_advantages, grpo_advantages

REWARDS = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [2.0, 2.0]]])  # [B=2, c=2, n=2]


def algorithm(**values: Any) -> DictConfig:
    return OmegaConf.create({"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": True, **values})


def compare(rewards: Tensor, length: int, group: str, algorithm: DictConfig) -> Tensor:
    """The advantage of each rollout, [B, c, n]: all of its tokens have the same."""
    nsp = NSPSettings(rollout_length=length, group=group)
    advantages = compute_advantages({"rewards": rewards}, nsp, algorithm)
    assert advantages.shape == (*rewards.shape, length) and (advantages == advantages[..., :1]).all()
    return advantages[..., 0]


def test_sequence_groups_by_hand() -> None:
    """Mean 4 and unbiased standard deviation sqrt(20/3) of 1, 3, 5, 7; equal rewards teach nothing."""
    got = compare(REWARDS, 5, "sequence", algorithm())
    std = (20 / 3) ** 0.5
    wanted = torch.tensor([[[-3.0, -1.0], [1.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]]) / std
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    assert got.dtype == torch.float32 and (got[1] == 0).all()


def test_answers_to_a_prompt_are_compared_with_each_other() -> None:
    """1, 3 against each other and 2, 2: whatever their lengths, one advantage per answer."""
    rewards, lengths = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[1, 4], [2, 2]])
    got = answer_advantages(rewards, lengths, 4, algorithm())
    half = 1 / 2**0.5
    assert got.shape == (2, 2, 4) and got.dtype == torch.float32
    assert got[0, 0, 0].item() == pytest.approx(-half, abs=1e-5)
    assert got[0, 1].tolist() == pytest.approx([half] * 4, abs=1e-5)
    assert not got[1].any()


def test_an_answer_is_paid_at_its_last_token() -> None:
    """An estimator that discounts sees where an answer ends."""
    given = algorithm(adv_estimator="reinforce_plus_plus", gamma=0.5)
    rewards, lengths = torch.tensor([[1.0, 0.0]]), torch.tensor([[3, 2]])
    got = answer_advantages(rewards, lengths, 4, given)[0]
    # returns 1/4, 1/2, 1 and 0, 0, whitened over the five tokens that count
    returns = torch.tensor([0.25, 0.5, 1.0, 0.0, 0.0])
    wanted = (returns - returns.mean()) / returns.std()
    assert got[0, :3].tolist() == pytest.approx(wanted[:3].tolist(), rel=1e-3)
    assert got[1, :2].tolist() == pytest.approx(wanted[3:].tolist(), rel=1e-3)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("group", ["sequence", "position"])
@pytest.mark.parametrize("shape", [(3, 4, 8), (5, 32, 8), (4, 2, 2), (2, 7, 1), (3, 1, 1), (2, 3, 33)])
def test_grpo_without_its_loop_is_verls_bit_for_bit(shape: tuple[int, int, int], group: str, divide: bool) -> None:
    """Rewards with few values, equal groups among them, and any; also as one place of token returns, strided."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(0, 6, (*shape, 3), generator=generator) / 5
    for outcomes in (torch.randn(shape, generator=generator), some[..., 1], torch.full(shape, 0.1)):
        wanted = rollout_advantages(
            get_adv_estimator_fn("grpo"), outcomes, 5, group, algorithm(norm_adv_by_std_in_grpo=divide)
        )
        got = grpo_advantages(outcomes, group, divide)
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype


def test_one_advantage_per_rollout() -> None:
    """An estimator that discounts has one per token: not the first one is taken silently."""
    with pytest.raises(ConfigError, match=r"reinforce_plus_plus \(algorithm.gamma=0.5\) gives each token"):
        compare(REWARDS, 5, "sequence", algorithm(adv_estimator="reinforce_plus_plus", gamma=0.5))
    same = compare(REWARDS, 5, "sequence", algorithm(adv_estimator="reinforce_plus_plus", gamma=1.0))
    assert same.shape == REWARDS.shape and same.std() > 0


def test_position_groups_by_hand() -> None:
    got = compare(REWARDS, 5, "position", algorithm())
    half = 1 / 2**0.5
    wanted = torch.tensor([[[-half, half], [-half, half]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_without_dividing_by_the_standard_deviation() -> None:
    got = compare(REWARDS, 5, "sequence", algorithm(norm_adv_by_std_in_grpo=False))
    assert got[0].tolist() == [[-3.0, -1.0], [1.0, 3.0]]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("group", ["sequence", "position"])
def test_random_rewards_agree_with_our_own_formula(group: str, length: int) -> None:
    rewards = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(0))
    got = compare(rewards, length, group, algorithm())
    torch.testing.assert_close(got, group_standardise(rewards, group), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("group", ["sequence", "position"])
def test_the_default_is_the_formula_of_adapt(group: str, divide: bool) -> None:
    """verl's `grpo` in training and `nsp.group_standardise` in one process, before either is rounded to float32."""
    rewards = torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = estimate(
        get_adv_estimator_fn("grpo"),
        rewards.flatten(),
        torch.full((rewards.numel(),), 5),
        5,
        group_ids(*rewards.shape, group),
        algorithm(norm_adv_by_std_in_grpo=divide),
    )
    wanted = group_standardise(rewards, group, divide_by_std=divide)
    torch.testing.assert_close(got[:, 0].view_as(wanted), wanted, rtol=1e-12, atol=1e-14)


def test_equal_rewards_that_float32_cannot_average_give_exactly_zero() -> None:
    rewards = torch.full((1, 7, 3), 0.1)
    assert (compare(rewards, 5, "sequence", algorithm()) == 0).all()


def test_rloo_by_hand() -> None:
    """Leave one out: each reward minus the mean of the other three."""
    got = compare(REWARDS, 5, "sequence", algorithm(adv_estimator="rloo"))
    wanted = [[1 - 5, 3 - 13 / 3], [5 - 11 / 3, 7 - 3]]
    torch.testing.assert_close(got[0], torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_a_users_estimator_gets_what_it_asks_for() -> None:
    seen: dict[str, Any] = {}

    def twice(token_level_rewards: Tensor, response_mask: Tensor, index: Any, **others: Any) -> tuple[Tensor, Tensor]:
        seen.update(rewards=token_level_rewards, mask=response_mask, index=list(index), others=set(others))
        outcome = 2 * token_level_rewards.sum(-1, keepdim=True) * response_mask
        return outcome, outcome

    register_adv_est("test_twice")(twice)
    try:
        got = compare(REWARDS, 4, "position", algorithm(adv_estimator="test_twice"))
    finally:
        del ADV_ESTIMATOR_REGISTRY["test_twice"]
    assert torch.equal(got, 2 * REWARDS)
    assert seen["rewards"].shape == (8, 4) and (seen["rewards"][:, :-1] == 0).all()
    assert seen["index"] == [0, 0, 1, 1, 2, 2, 3, 3] and {"config", "norm_adv_by_std_in_grpo"} <= seen["others"]


@pytest.mark.parametrize("name", ["remax", "optimal_token_baseline", "gae"])
def test_an_estimator_that_needs_more_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.adv_estimator: {name} needs "):
        check_estimator(name)


def test_every_other_estimator_of_verl_works() -> None:
    rewards = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0))
    refused = []
    for name in ADV_ESTIMATOR_REGISTRY:
        try:
            check_estimator(name)
        except ConfigError:
            refused.append(str(name))
            continue
        got = compare(rewards, 3, "sequence", algorithm(adv_estimator=str(name), gamma=1.0))
        assert got.shape == rewards.shape and got.isfinite().all() and (got != 0).any(), name
    assert sorted(refused) == ["gae", "optimal_token_baseline", "remax", "tir_optimal_token_baseline"]


@pytest.mark.parametrize(
    "name, within",
    [("grpo", True), ("rloo", True), ("reinforce_plus_plus", False), ("reinforce_plus_plus_baseline", False)],
)
@pytest.mark.parametrize("group", ["sequence", "position"])
def test_estimators_that_need_the_whole_batch_are_found(name: str, within: bool, group: str) -> None:
    """They whiten: with `refine.on_policy` they would see one micro-batch."""
    settings = algorithm(adv_estimator=name, gamma=1.0)
    assert compares_within_documents(get_adv_estimator_fn(name), 5, group, settings, (8, 3)) is within


EARNED = torch.tensor([[[[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]], [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]])  # [1, c=2, n=2, k=3]


@pytest.mark.parametrize("name", ["grpo", "rloo"])
@pytest.mark.parametrize("group", ["sequence", "position"])
def test_credit_per_token_by_hand(group: str, name: str) -> None:
    """Returns (3, 2, 2) and (3, 3, 0), (0, 0, 0) and (3, 2, 1), over 3; each compared with those of its own place."""
    returns = torch.tensor([[[3.0, 2.0, 2.0], [3.0, 3.0, 0.0]], [[0.0, 0.0, 0.0], [3.0, 2.0, 1.0]]]) / 3
    flat = returns.flatten(0, 1) if group == "sequence" else returns
    count, dim = (4, 0) if group == "sequence" else (2, 1)
    wanted = (flat - flat.mean(dim, keepdim=True)).view_as(returns) * (1 if name == "grpo" else count / (count - 1))
    nsp = NSPSettings(rollout_length=3, group=group, credit="token")
    given = algorithm(adv_estimator=name, norm_adv_by_std_in_grpo=False)
    got = compute_advantages({"token_rewards": EARNED}, nsp, given)
    assert got.shape == EARNED.shape and got.dtype == torch.float32
    torch.testing.assert_close(got[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_users_estimator_is_called_once_for_each_place() -> None:
    seen: list[list[float]] = []

    def twice(token_level_rewards: Tensor, response_mask: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        outcome = token_level_rewards.sum(-1, keepdim=True)
        seen.append(outcome.flatten().tolist())
        return 2 * outcome * response_mask, outcome

    register_adv_est("test_twice")(twice)
    try:
        nsp = NSPSettings(rollout_length=3, credit="token")
        got = compute_advantages({"token_rewards": EARNED}, nsp, algorithm(adv_estimator="test_twice"))
    finally:
        del ADV_ESTIMATOR_REGISTRY["test_twice"]
    torch.testing.assert_close(torch.tensor(seen).T.reshape(1, 2, 2, 3), token_returns(EARNED), rtol=0, atol=0)
    torch.testing.assert_close(got, 2 * token_returns(EARNED), rtol=0, atol=0)
