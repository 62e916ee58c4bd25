"""The objective and the advantages say the same as verl's own functions, which the trainer calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from refine_verl.nsp import group_ids, group_standardise, ppo_clip_loss, refine_objective

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")


def actor_config(global_rollouts: int) -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        global_batch_info={"dp_size": 1, "global_batch_size": global_rollouts},
    )


def verl_vanilla(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, global_rollouts: int
) -> tuple[Tensor, dict[str, Any]]:
    """verl's registered loss behind our `PolicyLoss`: how a worker plugs one in."""
    return core_algos.get_policy_loss_fn("vanilla")(
        old_log_prob=old_log_probs,
        log_prob=log_probs,
        advantages=advantages,
        response_mask=mask.to(log_probs.dtype),
        loss_agg_mode="seq-mean-token-mean",
        config=actor_config(global_rollouts),
    )


def rollouts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(40, 5, generator=generator, dtype=torch.float64)
    new = (old + torch.randn(40, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(40, 1, generator=generator, dtype=torch.float64).expand(40, 5)
    mask = torch.rand(40, 5, generator=generator) > 0.3
    mask[3] = False
    return new, old, advantages, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("global_rollouts", [40, 160])
def test_ppo_clip_is_verls_vanilla_loss(masked: bool, global_rollouts: int) -> None:
    new, old, advantages, mask = rollouts()
    if not masked:
        mask = torch.ones_like(mask)
    ours, our_metrics = ppo_clip_loss(new, old, advantages, mask, global_rollouts=global_rollouts)
    theirs, their_metrics = verl_vanilla(new, old, advantages, mask, global_rollouts=global_rollouts)
    # verl adds 1e-8 to the number of tokens of a rollout.
    torch.testing.assert_close(ours, theirs, rtol=2e-8, atol=0)
    gradients = [torch.autograd.grad(loss, new)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-8, atol=1e-12)
    assert gradients[0].abs().max() > 1e-4
    # verl computes its fractions in float32.
    assert {k: float(v) for k, v in our_metrics.items()} == pytest.approx(their_metrics, rel=1e-6)
    assert our_metrics["actor/pg_clipfrac_lower"] > 0


def test_the_objective_takes_verls_policy_loss() -> None:
    new, old, advantages, _ = rollouts()
    results = [
        refine_objective(
            torch.tensor(30.0), 10, new, old, advantages[:, 0],
            policy_loss=policy_loss, rl_coef=0.2, sft_coef=1.0, global_tokens=20, global_rollouts=80,
        )
        for policy_loss in (ppo_clip_loss, verl_vanilla)
    ]  # fmt: skip
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-8, atol=0)
    ours, theirs = ({k: float(v) for k, v in metrics.items()} for _, metrics in results)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert set(ours) >= {"actor/ntp_loss", "actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac"}


@pytest.mark.parametrize("group", ["sequence", "position"])
@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("shape", [(3, 8, 1), (3, 4, 5), (2, 1, 1)])
def test_advantages_are_verls_grpo(group: str, divide_by_std: bool, shape: tuple[int, int, int]) -> None:
    rewards = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rewards[0] = 0.75
    token_rewards = torch.zeros(rewards.numel(), 5, dtype=torch.float64)
    token_rewards[:, -1] = rewards.flatten()
    theirs, _ = core_algos.get_adv_estimator_fn("grpo")(
        token_level_rewards=token_rewards,
        response_mask=torch.ones(rewards.numel(), 5),
        index=group_ids(*shape, group),
        norm_adv_by_std_in_grpo=divide_by_std,
    )
    ours = group_standardise(rewards, group, divide_by_std=divide_by_std)
    assert ours.shape == shape
    # For a group of one, verl divides by a float32 1.000001.
    size = shape[1] * shape[2] if group == "sequence" else shape[2]
    tolerance = 1e-7 if size == 1 else 1e-12
    torch.testing.assert_close(ours.flatten()[:, None].expand(-1, 5), theirs, rtol=tolerance, atol=1e-12)
