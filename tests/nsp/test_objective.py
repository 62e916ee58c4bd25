from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from reference import nsp as reference
from torch import Tensor

from refine_verl.nsp import (
    group_ids,
    group_standardise,
    group_zero_std_share,
    ppo_clip_loss,
    refine_objective,
)


def random_rollouts(rollouts: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs, old_log_probs, advantages with ratios far outside the clip range on both sides."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rollouts, length, generator=generator, dtype=torch.float64)
    new = old + torch.randn(rollouts, length, generator=generator, dtype=torch.float64)
    return new, old, torch.randn(rollouts, generator=generator, dtype=torch.float64)


def test_ppo_clip_by_hand() -> None:
    """Ratios 1.5, 0.5 with A = 2 and A = -1: clipped at 1.2 where that lowers the objective, else not."""
    old = torch.zeros(2, 2, dtype=torch.float64)
    new = torch.tensor([[1.5, 0.5], [1.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    loss, metrics = ppo_clip_loss(new, old, torch.tensor([2.0, -1.0], dtype=torch.float64))
    # A = 2: -2 * (1.2 + 0.5) / 2. A = -1: (1.5 + 0.8) / 2. Mean over two rollouts.
    assert loss.item() == pytest.approx((-1.7 + 1.15) / 2, rel=1e-14)
    (gradient,) = torch.autograd.grad(loss, new)
    # Clipped tokens have none; the others -A * ratio / (k * rollouts).
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.25], [0.375, 0.0]], dtype=torch.float64))
    assert metrics["actor/pg_clipfrac"].item() == 0.5
    assert metrics["actor/ppo_kl"].item() == pytest.approx(-math.log(0.75) / 2)
    assert metrics["actor/pg_clipfrac_lower"].item() == 0


def test_dual_clip_by_hand() -> None:
    """A ratio of 5 against A = -1 costs 3, not 5; switched off it costs 5; A > 0 is not touched."""
    old, new = torch.zeros(1, 1), torch.full((1, 1), math.log(5))
    bad = torch.tensor([-1.0])
    bounded, metrics = ppo_clip_loss(new, old, bad)
    assert bounded.item() == pytest.approx(3)
    assert metrics["actor/pg_clipfrac_lower"].item() == 1
    assert ppo_clip_loss(new, old, bad, clip_ratio_c=None)[0].item() == pytest.approx(5)
    assert ppo_clip_loss(new, old, -bad)[0].item() == pytest.approx(-1.2)


def test_ppo_clip_matches_reference_and_its_mask_leaves_tokens_out() -> None:
    new, old, advantages = random_rollouts(6, 5)
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0], mask[1] = False, True
    expected = []
    for i in range(6):
        tokens = [
            reference.ppo_clip_token(float(new[i, j]), float(old[i, j]), float(advantages[i]), 0.2)
            for j in range(5)
            if mask[i, j]
        ]
        if tokens:
            expected.append(sum(tokens) / len(tokens))
    loss, _ = ppo_clip_loss(new, old, advantages, mask, clip_ratio_c=None)
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    per_token, _ = ppo_clip_loss(new, old, advantages[:, None].expand(6, 5), mask, clip_ratio_c=None)
    assert torch.equal(loss, per_token)


def test_one_sided_clip_ratios() -> None:
    old = torch.zeros(1, 2)
    new = torch.tensor([[2.0, 0.1]]).log()
    up = ppo_clip_loss(new, old, torch.tensor([[1.0, -1.0]]), clip_ratio_high=0.5, clip_ratio_low=0.3)[0]
    assert up.item() == pytest.approx((-1.5 + 0.7) / 2)


def share(part: slice, tensors: dict[str, Tensor], **settings: Any) -> tuple[Tensor, dict[str, Any]]:
    """The objective of some documents of a mini-batch; each has 2 rollouts and its own number of tokens."""
    losses = [torch.nn.functional.softplus(tensors["weight"] * n).sum() for n in tensors["lengths"][part]]
    rows = slice(2 * part.start, 2 * part.stop)
    return refine_objective(
        torch.stack(losses).sum(),
        int(tensors["lengths"][part].sum()),
        tensors["new"][rows] * tensors["weight"][0],
        tensors["old"][rows],
        tensors["advantages"][rows],
        rl_coef=0.2,
        sft_coef=1.0,
        global_tokens=int(tensors["lengths"].sum()),
        global_rollouts=len(tensors["new"]),
        **settings,
    )


@pytest.fixture
def mini_batch() -> dict[str, Tensor]:
    new, old, advantages = random_rollouts(12, 5)
    return {
        "new": new,
        "old": old,
        "advantages": advantages,
        "lengths": torch.tensor([3, 50, 7, 7, 90, 11]),
        "weight": torch.tensor([0.9, 0.2], dtype=torch.float64, requires_grad=True),
    }


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 2, 2), (3, 1, 2), (1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_any_split_of_a_mini_batch_is_the_same(
    mini_batch: dict[str, Tensor], sizes: tuple[int, ...], ranks: int
) -> None:
    """Loss, every metric and the gradient; `ranks` are averaged afterwards, as FSDP does."""
    whole, whole_metrics = share(slice(0, 6), mini_batch)
    (whole_gradient,) = torch.autograd.grad(whole, mini_batch["weight"])
    loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    metrics: dict[str, float] = dict.fromkeys(whole_metrics, 0.0)
    start = 0
    for size in sizes:
        part_loss, part_metrics = share(slice(start, start + size), mini_batch, dp_size=ranks)
        gradient += torch.autograd.grad(part_loss, mini_batch["weight"])[0] / ranks
        loss += part_loss.detach() / ranks
        for name, value in part_metrics.items():
            metrics[name] += float(value)
        start += size
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=0)
    assert metrics == pytest.approx({name: float(value) for name, value in whole_metrics.items()}, rel=1e-12)


def test_local_denominators_would_be_caught(mini_batch: dict[str, Tensor]) -> None:
    """Negative control: averaging micro-batch means differs, since the documents have unequal lengths."""
    whole = share(slice(0, 6), mini_batch)[0]
    means = [part[0] * 6 for part in (share(slice(i, i + 1), mini_batch) for i in range(6))]
    local = [(torch.nn.functional.softplus(mini_batch["weight"] * n).sum() / n) for n in mini_batch["lengths"]]
    assert torch.stack(means).mean().item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.stack(local).mean().item() != pytest.approx(whole.item(), rel=1e-2)


def test_objective_by_hand() -> None:
    """12 nats over 6 tokens is 2; ratio 1, A = 3 and -1 gives -1; 0.5 * -1 + 2 * 2 = 3.5."""
    zeros = torch.zeros(2, 4)
    loss, metrics = refine_objective(
        torch.tensor(12.0), 6, zeros, zeros, torch.tensor([3.0, -1.0]),
        rl_coef=0.5, sft_coef=2.0, global_tokens=6, global_rollouts=2,
    )  # fmt: skip
    assert loss.item() == 3.5
    assert metrics["actor/ntp_loss"].item() == 2.0
    assert metrics["actor/pg_loss"].item() == -1.0


def test_objective_without_rollouts_is_fine_tuning() -> None:
    loss, metrics = refine_objective(
        torch.tensor(12.0), 6, rl_coef=0.2, sft_coef=1.0, global_tokens=12, global_rollouts=0
    )
    assert loss.item() == 1.0
    assert set(metrics) == {"actor/ntp_loss"}


def test_an_empty_micro_batch_still_has_a_graph() -> None:
    """A rank without rollouts must run backward all the same: collectives stay in step."""
    new = torch.zeros(0, 5, requires_grad=True)
    ntp = torch.zeros((), requires_grad=True)
    loss, _ = refine_objective(
        ntp, 0, new, torch.zeros(0, 5), torch.zeros(0),
        rl_coef=0.2, sft_coef=1.0, global_tokens=10, global_rollouts=4,
    )  # fmt: skip
    assert loss.item() == 0
    loss.backward()
    assert new.grad is not None


def test_counts_of_a_micro_batch_instead_of_the_mini_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="7 predicted tokens and 0 rollouts .* 6 and 2: .* all ranks"):
        refine_objective(torch.tensor(1.0), 7, rl_coef=0.2, sft_coef=1.0, global_tokens=6, global_rollouts=2)
    with pytest.raises(ValueError, match="old_log_probs and advantages"):
        refine_objective(
            torch.tensor(1.0), 6, torch.zeros(1, 2),
            rl_coef=0.2, sft_coef=1.0, global_tokens=6, global_rollouts=2,
        )  # fmt: skip


def test_standardise_by_hand() -> None:
    """Rewards 1, 2 | 3, 4: mean 2.5, unbiased std sqrt(5/3); per position the std is sqrt(1/2)."""
    rewards = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    sequence = group_standardise(rewards, eps=0.0)
    expected = (rewards - 2.5) / math.sqrt(5 / 3)
    torch.testing.assert_close(sequence, expected, rtol=1e-14, atol=0)
    position = group_standardise(rewards, "position", eps=0.0)
    half = math.sqrt(0.5)
    torch.testing.assert_close(position, torch.tensor([[[-half, half]] * 2], dtype=torch.float64))
    assert group_standardise(rewards, divide_by_std=False).flatten().tolist() == [-1.5, -0.5, 0.5, 1.5]


def test_standardise_of_equal_rewards_and_of_single_rollouts() -> None:
    equal = torch.full((2, 3, 1), 0.7)
    assert group_standardise(equal).abs().max().item() < 1e-6
    torch.testing.assert_close(group_standardise(equal, "position"), equal, rtol=1e-5, atol=0)


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.rand(3, 4, 2)
    changed = rewards.clone()
    changed[1] += torch.rand(4, 2)
    before, after = group_standardise(rewards), group_standardise(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_group_ids_by_hand() -> None:
    assert group_ids(2, 2, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert group_ids(2, 2, 2, "position").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert group_ids(1, 2, 1).dtype == np.int64


def test_share_of_groups_without_signal() -> None:
    rewards = torch.tensor([[[0.1, 0.1], [0.1, 0.1]], [[0.3, 0.3], [0.1, 0.2]]])
    assert group_zero_std_share(rewards) == 0.5
    assert group_zero_std_share(rewards, "position") == 0.75
    assert group_zero_std_share(rewards[:, :, :1], "position") == 0.0


@pytest.mark.parametrize("function", [group_standardise, group_zero_std_share])
def test_bad_groups_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="unknown group 'sequences'. Allowed: position, sequence. Did you mean"):
        function(torch.rand(2, 3, 1), "sequences")
    with pytest.raises(ValueError, match=r"\[B, c, n\], got \[2, 3\]"):
        function(torch.rand(2, 3))
    with pytest.raises(ValueError, match="unknown group"):
        group_ids(1, 1, 1, "batch")
