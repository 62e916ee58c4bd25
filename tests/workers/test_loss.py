"""The loss as verl's workers call it, by hand and against the objective it is made of."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, PolicyLossConfig

from refine_verl.compose.verl_keys import UNSUPPORTED_LOSSES
from refine_verl.config import LossSettings
from refine_verl.nsp import ppo_clip_loss, refine_objective
from refine_verl.workers.loss import RefineLoss
from refine_verl.workers.objective import Objective


def actor(**values: object) -> ActorConfig:
    settings = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, **values}
    return ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)


def micro_batch(old: Tensor, advantages: Tensor, tokens: int, totals: tuple[int, int], dp_size: int = 1) -> TensorDict:
    """``old`` [N, c, n, k], ``advantages`` [N, c, n, k]; totals of the mini-batch: predicted tokens, rollouts."""
    rows = len(old)
    mask = torch.zeros(rows, dtype=torch.int64)
    mask[0] = tokens
    counts = {"batch_num_tokens": totals[0], "global_rollouts": totals[1], "dp_size": dp_size}
    counts["global_rollout_tokens"] = totals[1] * old.shape[-1]
    tensors = {"old_log_probs": old, "advantages": advantages, "loss_mask": mask, "weight": torch.ones(rows)}
    return tu.get_tensordict(tensor_dict=tensors, non_tensor_dict={**counts, "objective": Objective.ROLLOUTS})


def test_by_hand() -> None:
    """Two rollouts of two tokens. Ratios 1.5 and 0.5 clip to 1.2 and stay 0.5; L = 0.5 * L_PPO + 2 * L_NTP."""
    old = torch.full((1, 2, 1, 2), -2.0)
    new = (old + torch.tensor([[1.5, 0.5], [1.0, 1.0]]).log().view(1, 2, 1, 2)).flatten(0, 2)
    data = micro_batch(old, torch.tensor([[[[1.0, 1.0]], [[-1.0, -1.0]]]]), tokens=10, totals=(10, 2))
    loss, metrics = RefineLoss(LossSettings(rl_coef=0.5, sft_coef=2.0), actor())(
        {"ntp_loss_sum": torch.tensor(30.0), "log_probs": new}, data
    )
    pg = ((-1.2 - 0.5) / 2 + (1 + 1) / 2) / 2
    assert loss.item() == pytest.approx(0.5 * pg + 2 * 3.0)
    values = {name: metric.aggregate() for name, metric in metrics.items()}
    assert values["actor/ntp_loss"] == pytest.approx(3.0)
    assert values["actor/pg_loss"] == pytest.approx(pg)
    assert values["actor/pg_clipfrac"] == pytest.approx(0.25)
    assert values["actor/log_prob_gap"] == pytest.approx((math.log(1.5) - math.log(0.5)) / 4)
    assert values["actor/ppo_kl"] == pytest.approx(-(math.log(1.5) + math.log(0.5)) / 4)


def random_case(rows: int = 3) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(rows, 4, 2, 5, generator=generator, dtype=torch.float64)
    new = old + 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(old.shape, generator=generator, dtype=torch.float64)
    output = {
        "ntp_loss_sum": torch.tensor(57.0, dtype=torch.float64, requires_grad=True),
        "log_probs": new.flatten(0, 2).requires_grad_(),
    }
    return output, old, advantages


@pytest.mark.parametrize("dp_size", [1, 4])
def test_it_is_the_objective(dp_size: int) -> None:
    """A third of a mini-batch: value and gradients are those of the share that `nsp` defines."""
    output, old, advantages = random_case()
    totals = (60, 72)
    got, _ = RefineLoss(LossSettings(rl_coef=0.2, sft_coef=1.0), actor())(
        output, micro_batch(old, advantages, 20, totals, dp_size)
    )
    wanted, _ = refine_objective(
        output["ntp_loss_sum"],
        20,
        output["log_probs"],
        old.flatten(0, 2),
        advantages.flatten(0, 2),
        policy_loss=ppo_clip_loss,
        rl_coef=0.2,
        sft_coef=1.0,
        global_tokens=totals[0],
        global_rollouts=totals[1],
        dp_size=dp_size,
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    leaves = list(output.values())
    for mine, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_micro_batches_and_ranks_add_up() -> None:
    """As verl does it: losses and metrics averaged over ranks, then summed over micro-batches."""
    output, old, advantages = random_case(rows=4)
    totals, settings = (40, 32), LossSettings(rl_coef=0.2, sft_coef=1.0)
    whole, metrics = RefineLoss(settings, actor())(output, micro_batch(old, advantages, 40, totals))
    parts = []
    for b in range(4):  # two ranks of two micro-batches
        share = {"ntp_loss_sum": output["ntp_loss_sum"] / 4, "log_probs": output["log_probs"][8 * b : 8 * b + 8]}
        data = micro_batch(old[b : b + 1], advantages[b : b + 1], 10, totals, dp_size=2)
        parts.append(RefineLoss(settings, actor())(share, data))
    total = sum(loss for loss, _ in parts) / 2
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    for name, metric in metrics.items():
        summed = sum(part[name].aggregate() for _, part in parts) / 2
        assert summed == pytest.approx(metric.aggregate(), rel=1e-6, abs=1e-12), name


# clip_cov and kl_cov choose tokens by their rank in what they are given: in a micro-batch
NOT_ADDITIVE = {"clip_cov", "kl_cov"}


@pytest.mark.parametrize("name", sorted(set(POLICY_LOSS_REGISTRY) - set(UNSUPPORTED_LOSSES) - NOT_ADDITIVE))
def test_every_loss_of_verl_that_is_allowed_adds_up(name: str) -> None:
    output, old, advantages = random_case(rows=4)
    totals, settings = (40, 32), LossSettings(rl_coef=1.0, sft_coef=1.0)
    loss = RefineLoss(settings, actor(policy_loss=PolicyLossConfig(loss_mode=name, dro_beta=1.0)))
    whole, _ = loss(output, micro_batch(old, advantages, 40, totals))
    total = 0.0
    for b in range(4):
        share = {"ntp_loss_sum": output["ntp_loss_sum"] / 4, "log_probs": output["log_probs"][8 * b : 8 * b + 8]}
        total += loss(share, micro_batch(old[b : b + 1], advantages[b : b + 1], 10, totals))[0].item()
    assert total == pytest.approx(whole.item(), rel=1e-6)


def test_a_users_metrics_may_be_numbers_or_tensors_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"a": 1.5, "b": torch.tensor([2.5]), "c": torch.tensor(3, dtype=torch.int64), "d": 4}
    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "own", lambda **given: (given["log_prob"].sum(), found))
    output, old, advantages = random_case()
    loss = RefineLoss(LossSettings(), actor(policy_loss=PolicyLossConfig(loss_mode="own")))
    _, metrics = loss(output, micro_batch(old, advantages, 20, (60, 24), dp_size=2))
    assert {name: metrics[name].aggregate() for name in found} == {"a": 3.0, "b": 5.0, "c": 6.0, "d": 8.0}


def test_the_loss_that_is_not_allowed_does_not_add_up() -> None:
    """The control: a mean over each micro-batch."""
    with pytest.raises(AssertionError):
        test_every_loss_of_verl_that_is_allowed_adds_up("geo_mean")


def test_without_rollouts_only_the_next_token_loss_is_left() -> None:
    data = micro_batch(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 4, (8, 0))
    tu.assign_non_tensor(data, objective=Objective.DOCUMENTS)
    loss, metrics = RefineLoss(LossSettings(rl_coef=0.2, sft_coef=1.0), actor())(
        {"ntp_loss_sum": torch.tensor(6.0)}, data
    )
    assert loss.item() == pytest.approx(6 / 8) and set(metrics) == {"actor/ntp_loss"}


def test_verls_settings_and_other_losses_apply() -> None:
    output, old, advantages = random_case()
    data = micro_batch(old, advantages, 20, (20, 24))
    settings = LossSettings(rl_coef=1.0, sft_coef=0.0)
    plain, _ = RefineLoss(settings, actor())(output, data)
    narrow, _ = RefineLoss(settings, actor(clip_ratio=0.01, clip_ratio_low=0.01, clip_ratio_high=0.01))(output, data)
    assert narrow.item() != plain.item()
    other = actor(policy_loss=OmegaConf.create({"loss_mode": "gpg"}))
    got, _ = RefineLoss(settings, other)(output, data)
    wanted = -(advantages.flatten(0, 2) * output["log_probs"]).mean()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_it_can_be_sent_to_workers() -> None:
    output, old, advantages = random_case()
    data = micro_batch(old, advantages, 20, (20, 24))
    loss = RefineLoss(LossSettings(rl_coef=0.2, sft_coef=1.0), actor())
    copy = pickle.loads(pickle.dumps(loss))
    assert copy(output, data)[0].item() == loss(output, data)[0].item()


def answer_batch(
    old: Tensor, advantages: Tensor, lengths: Tensor, tokens: int, rollouts: int, weight: Tensor | None = None
) -> TensorDict:
    """``old`` and ``advantages`` [N, n, A], ``lengths`` [N, n]; totals of the mini-batch: answer tokens, answers."""
    tensors = {
        "answer_tokens": torch.zeros(old.shape, dtype=torch.int64),
        "answer_lengths": lengths,
        "old_log_probs": old,
        "advantages": advantages,
        "loss_mask": lengths.sum(dim=1),
        "weight": torch.ones(len(old)) if weight is None else weight,
    }
    counts = {"batch_num_tokens": tokens, "global_rollouts": rollouts, "dp_size": 1, "global_rollout_tokens": tokens}
    return tu.get_tensordict(tensor_dict=tensors, non_tensor_dict={**counts, "objective": Objective.ANSWERS})


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
def test_answers_of_unequal_length_by_hand(mode: str) -> None:
    """An answer of one token (ratio 1.5 clips to 1.2) and one of two (ratio 1, advantages 1 and 1.2).

    What follows an answer's end is never looked at, and neither coefficient weighs the loss.
    """
    old = torch.full((1, 2, 3), -2.0)
    ratios = torch.tensor([[[1.5, 9.0, 9.0], [1.0, 1.0, 9.0]]])
    advantages = torch.tensor([[[1.0, 7.0, 7.0], [1.0, 1.2, 7.0]]])
    new = (old + ratios.log()).flatten(0, 1).requires_grad_()
    data = answer_batch(old, advantages, torch.tensor([[1, 2]]), tokens=3, rollouts=2)
    loss, metrics = RefineLoss(LossSettings(rl_coef=0.3, sft_coef=2.0), actor(loss_agg_mode=mode))(
        {"log_probs": new}, data
    )
    by_hand = {"seq-mean-token-mean": -(1.2 + 1.1) / 2, "token-mean": -(1.2 + 1.0 + 1.2) / 3}[mode]
    assert loss.item() == pytest.approx(by_hand)
    assert "actor/ntp_loss" not in metrics
    assert metrics["actor/log_prob_gap"].aggregate() == pytest.approx(math.log(1.5) / 3)
    loss.backward()
    assert new.grad is not None and not new.grad[0].any()  # clipped, and behind the end
    assert new.grad[1, :2].all() and not new.grad[1, 2]


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
def test_rollouts_of_unequal_length_by_hand(mode: str) -> None:
    """A position whose rollouts have one token (ratios 1.5, which clips to 1.2, and 1), and one where they have two."""
    old = torch.full((1, 2, 2, 3), -2.0)
    ratios = torch.tensor([[[[1.5, 9, 9], [1, 9, 9]], [[1, 1, 9], [1.1, 1, 9]]]])
    advantages = torch.tensor([[[[1.0, 7, 7], [2, 7, 7]], [[1, 3, 7], [1, -1, 7]]]])
    new = (old + ratios.log()).flatten(0, 2).requires_grad_()
    data = micro_batch(old, advantages, 0, (10, 4))
    data["rollout_lengths"] = torch.tensor([[1, 2]])
    tu.assign_non_tensor(data, global_rollout_tokens=6)
    output = {"ntp_loss_sum": torch.zeros(()), "log_probs": new}
    loss, metrics = RefineLoss(LossSettings(rl_coef=0.5), actor(loss_agg_mode=mode))(output, data)
    by_hand = {
        "seq-mean-token-mean": -(1.2 + 2 + (1 + 3) / 2 + (1.1 - 1) / 2) / 4,
        "token-mean": -(1.2 + 2 + 1 + 3 + 1.1 - 1) / 6,
    }
    assert loss.item() == pytest.approx(0.5 * by_hand[mode])
    assert metrics["actor/log_prob_gap"].aggregate() == pytest.approx((math.log(1.5) + math.log(1.1) / 2) / 4)
    loss.backward()
    assert new.grad is not None and not new.grad[:2, 1:].any() and not new.grad[:, 2].any()
    assert new.grad[1, 0] and new.grad[2:, :2].all()


def test_answers_are_learned_with_weight_one() -> None:
    data = tu.get_tensordict(
        tensor_dict={"loss_mask": torch.tensor([4])},
        non_tensor_dict={"batch_num_tokens": 8, "global_rollouts": 0, "dp_size": 1, "objective": Objective.REFERENCES},
    )
    loss, _ = RefineLoss(LossSettings(sft_coef=2.0), actor())({"ntp_loss_sum": torch.tensor(12.0)}, data)
    assert loss.item() == pytest.approx(1.5)


@pytest.mark.parametrize("answers", [False, True])
def test_rows_without_weight_stay_in_the_graph_and_add_nothing(answers: bool) -> None:
    output, old, advantages = random_case(rows=2)
    weight = torch.tensor([1.0, 0.0])
    lengths = torch.full((2, 8), 5)
    loss_of = RefineLoss(LossSettings(), actor())
    if answers:
        log_probs = {"log_probs": output["log_probs"]}
        spread = advantages.flatten(1, 2)
        old = old.flatten(1, 2)
        both, _ = loss_of(log_probs, answer_batch(old, spread, lengths, 40, 8, weight))
        alone = {"log_probs": output["log_probs"].detach()[:8]}
        wanted, _ = loss_of(alone, answer_batch(old[:1], spread[:1], lengths[:1], 40, 8))
    else:
        data = micro_batch(old, advantages, 20, (20, 8))
        data["weight"] = weight
        both, _ = loss_of(output, data)
        alone = {**output, "log_probs": output["log_probs"].detach()[:8]}
        wanted, _ = loss_of(alone, micro_batch(old[:1], advantages[:1], 20, (20, 8)))
    assert both.item() == pytest.approx(wanted.item())
    both.backward()
    gradient = output["log_probs"].grad
    assert gradient is not None and gradient[:8].any() and not gradient[8:].any()
