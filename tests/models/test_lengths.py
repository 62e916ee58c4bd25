"""Rollouts of unequal lengths: forked, recomputed, fused; what lies behind their end counts nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models.test_fork_equals_prefix import NSP, assert_same_step, documents_of, relative
from models.test_on_policy import step

from refine_verl.config import ConfigError, LossSettings, RolloutLength
from refine_verl.models import FastWeightActor
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step, counted_rollout_tokens
from refine_verl.nsp import group_standardise, ppo_clip_loss

Make = Callable[..., FastWeightActor]
BY = {
    by: replace(NSP, rollout_length=RolloutLength(min=1, max=4, by=by), credit="token")
    for by in ("entropy", "sentence")
}


@pytest.fixture
def build(make: Make) -> Make:
    def with_ends(**kwargs: object) -> FastWeightActor:
        actor = make(**kwargs)
        actor.sentence_ends = tuple(range(25))  # two of five tokens
        return actor

    return with_ends


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_the_fused_step_is_the_step(build: Make, by: str, checkpointing: str) -> None:
    documents = documents_of((40, 33, 51))
    fused = step(build(activation_checkpointing=checkpointing), documents, BY[by], fused=True)
    wanted = step(build(), documents, BY[by], fused=False)
    assert_same_step(fused, wanted)
    lengths = wanted[0]["rollout_lengths"]
    assert lengths.shape == (3, 3) and 1 <= lengths.min() < lengths.max() <= 4
    fixed = step(build(), documents, replace(BY[by], rollout_length=4), fused=False)
    worst = max(relative(fixed[1][name], wanted[1][name]) for name in wanted[1])
    assert worst > 1e-2, "negative control: all four tokens of all rollouts"


@pytest.mark.parametrize("by", BY)
def test_recomputed_prefixes_have_the_same_lengths(build: Make, by: str) -> None:
    documents = documents_of((40, 33))
    prefix = replace(BY[by], rollout="prefix")
    assert_same_step(step(build(), documents, BY[by], fused=False), step(build(), documents, prefix, fused=False))


def test_what_is_behind_the_end_plays_no_part(build: Make) -> None:
    """Other tokens there: the same loss and the same gradients, bit for bit."""
    actor, documents, nsp = build(), documents_of((40, 33)), BY["sentence"]
    model_step = Step(actor, nsp, 0)
    rollouts = model_step.write_and_reward(1, documents, range(2), HiddenStateRewardManager("binary", credit="token"))
    rollouts["advantages"] = group_standardise(rollouts["rewards"])[..., None].expand(rollouts["rollout_tokens"].shape)
    found = []
    counted = counted_rollout_tokens(rollouts)
    assert counted is not None and counted.any() and not counted.all()
    for shown in (0, 7):
        tokens = rollouts["rollout_tokens"].flatten(0, 2)
        changed = torch.where(counted, tokens, (tokens + shown) % 61).view_as(rollouts["rollout_tokens"])
        assert torch.equal(changed, rollouts["rollout_tokens"]) == (shown == 0)
        actor.zero_grad()
        loss, _ = model_step.loss(
            documents,
            {**rollouts, "rollout_tokens": changed},
            LossSettings(rl_coef=1.0),
            policy_loss=ppo_clip_loss,
            global_tokens=documents.predicted,
            global_rollouts=counted.shape[0],
        )
        loss.backward()
        found.append((loss.detach(), [parameter.grad.clone() for parameter in actor.parameters()]))
    (one, gradients), (other, others) = found
    assert torch.equal(one, other)
    for gradient, another in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, another, rtol=1e-12, atol=1e-14)


def test_sentences_need_a_tokenizer(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"refine\.nsp\.rollout_length\.by: sentence needs a tokenizer"):
        step(make(), documents_of((40,)), BY["sentence"], fused=False)
