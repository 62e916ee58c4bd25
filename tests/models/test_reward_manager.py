"""Rewards of a batch of rollouts: which one trains, and that rows meet their own targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refine_verl.models import RolloutBatch
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.nsp import RewardInputs

N, C, COPIES, K, D = 2, 3, 2, 4, 5


def rollouts() -> RolloutBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (N, C, COPIES, K), generator=generator)
    return RolloutBatch(
        positions=torch.zeros(N, C, dtype=torch.int64),
        tokens=tokens,
        log_probs=torch.zeros(N, C, COPIES, K),
        predicted_hidden=torch.randn(N, C, COPIES, K, D, generator=generator),
        target_hidden=torch.randn(N, C, K, D, generator=generator),
        target_tokens=torch.randint(0, 3, (N, C, K), generator=generator),
        entropy_mean=torch.zeros(N),
        entropy_selected=torch.zeros(N, C),
    )


def first_token(inputs: RewardInputs) -> Tensor:
    """A user's reward, found by its import path."""
    return inputs.predicted_tokens[:, 0].float()


@pytest.mark.parametrize("reward", ["cosine", "binary", "hybrid"])
def test_each_rollout_is_compared_with_its_own_continuation(reward: str) -> None:
    batch = rollouts()
    got = HiddenStateRewardManager(reward)(batch)
    assert set(got) == {"rewards", "reward_cosine", "reward_binary"}
    for b in range(N):
        for c in range(C):
            for r in range(COPIES):
                cosine = F.cosine_similarity(batch.predicted_hidden[b, c, r], batch.target_hidden[b, c], dim=-1)
                binary = (batch.tokens[b, c, r] == batch.target_tokens[b, c]).float()
                at = (b, c, r)
                assert got["reward_cosine"][at].item() == pytest.approx(cosine.mean().item(), abs=1e-6)
                assert got["reward_binary"][at].item() == pytest.approx(binary.mean().item(), abs=1e-6)
    if reward != "hybrid":
        assert torch.equal(got["rewards"], got[f"reward_{reward}"])
    else:
        assert not torch.equal(got["rewards"], got["reward_cosine"])
    assert all(value.shape == (N, C, COPIES) and value.dtype == torch.float32 for value in got.values())


def test_a_users_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("a_users_rewards")
    module.first_token = first_token
    monkeypatch.setitem(sys.modules, "a_users_rewards", module)
    batch = rollouts()
    got = HiddenStateRewardManager("a_users_rewards.first_token")(batch)
    assert torch.equal(got["rewards"], batch.tokens[..., 0].float())
