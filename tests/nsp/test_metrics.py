"""What is reported of rewards and rollouts, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from refine_verl.nsp import reward_metrics, rollout_metrics

REWARDS = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [2.0, 2.0]]])  # [B=2, c=2, n=2]


@pytest.mark.parametrize(("group", "silent"), [("sequence", 0.5), ("position", 0.5)])
def test_rewards(group: str, silent: float) -> None:
    """1, 3, 5, 7 and four times 2: mean 3, sum of squares about it 4 + 0 + 4 + 16 + 4 = 28 over seven."""
    found = reward_metrics("answer", REWARDS, group)
    assert found == pytest.approx(
        {
            "answer/reward/mean": 3.0,
            "answer/reward/std": math.sqrt(28 / 7),
            "answer/reward/min": 1.0,
            "answer/reward/max": 7.0,
            "answer/group_zero_std": silent,
        }
    )


def test_groups_are_told_apart() -> None:
    rewards = torch.tensor([[[1.0, 1.0], [5.0, 7.0]]])
    assert reward_metrics("nsp", rewards, "sequence")["nsp/group_zero_std"] == 0.0
    assert reward_metrics("nsp", rewards, "position")["nsp/group_zero_std"] == 0.5


def test_a_single_reward_has_no_deviation() -> None:
    assert reward_metrics("nsp", torch.ones(1, 1, 1))["nsp/reward/std"] == 0.0


def test_rollouts() -> None:
    found = rollout_metrics(
        {
            "rewards": REWARDS,
            "reward_cosine": REWARDS / 10,
            "reward_binary": REWARDS / 100,
            "entropy_mean": torch.tensor([1.0, 2.0]),
            "entropy_selected": torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
        },
        "sequence",
    )
    assert {name: found[name] for name in found if "reward/" not in name} == pytest.approx(
        {
            "nsp/reward_cosine/mean": 0.3,
            "nsp/reward_binary/mean": 0.03,
            "nsp/entropy/mean": 1.5,
            "nsp/entropy/selected_mean": 4.5,
            "nsp/group_zero_std": 0.5,
        }
    )
    assert found["nsp/reward/mean"] == 3.0
