"""Whole models on fla's real kernels: forking the state and recomputing every prefix agree, with all gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference.toy import loss_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from refine_verl.config import LossSettings, NSPSettings
from refine_verl.kernels.patch import cpu_kernels_in_use
from refine_verl.models import Branches, Documents, FastWeightActor, RolloutBatch, RolloutDraws, make_actor
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step
from refine_verl.nsp import (
    group_standardise,
    position_uniforms,
    ppo_clip_loss,
    rollout_uniforms,
)

TOLERANCE = 3e-5
"""Relative, of each tensor as a whole: float32, and the pieces of a document round otherwise. Seen: 3e-6."""
WRONG = 1e-2
"""Hundreds of times as much, and less than one token too many changes."""

NSP = NSPSettings(chunks=2, rollout_length=3, rollouts_per_position=1)
LENGTHS = (90, 30)
"""One of more than a chunk of 64 tokens, one of less."""

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "vocab_size": 61,
    "hidden_ratio": 2,
    "fuse_cross_entropy": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "delta_net": {},
    "gated_deltanet": {"head_dim": 16, "expand_v": 1.0},
    "gla": {"use_short_conv": True},
    "hgrn2": {"use_short_conv": True, "expand_ratio": 16},
    "gated_deltaproduct": {"head_dim": 16, "expand_v": 1.0},
    "kda": {"head_dim": 16},
}


def make(family: str, layers: int = 2) -> FastWeightActor:
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES[family], "num_hidden_layers": layers})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # larger weights than at initialisation: every part of the model matters
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return make_actor(model)


def documents() -> Documents:
    tokens = torch.randint(0, 61, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(3))
    return Documents.from_tensors(tokens, LENGTHS)


def draws() -> RolloutDraws:
    shape = (NSP.chunks, NSP.rollouts_per_position, NSP.rollout_length)
    rows = range(len(LENGTHS))
    return RolloutDraws(
        torch.stack([torch.from_numpy(position_uniforms(0, 1, b, NSP.chunks)) for b in rows]),
        torch.stack([torch.from_numpy(rollout_uniforms(0, 1, b, *shape)) for b in rows]),
    )


def step(actor: FastWeightActor, branches: Branches, old: Tensor, how: str) -> dict[str, Tensor]:
    """Losses, log-probabilities and the gradient of every parameter."""
    actor.zero_grad()
    given = documents()
    output = actor(mode="update", documents=given, branches=branches, nsp=replace(NSP, rollout=how))
    advantages = group_standardise(torch.arange(4.0).view(2, 2, 1)).flatten()
    loss = loss_of(output, given, old, advantages)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in actor.named_parameters()}
    return {"loss": loss.detach(), **{name: value.detach() for name, value in output.items()}, **gradients}


def errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == wanted.keys()
    return {name: ((got[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted}


def rollouts(actor: FastWeightActor, how: str) -> tuple[RolloutBatch, int]:
    """And the number of tokens that went through the model for them."""
    before = actor.forward_tokens
    written = actor(mode="rollout", documents=documents(), nsp=replace(NSP, rollout=how), draws=draws(), snapshots=4)
    return written, actor.forward_tokens - before


@pytest.mark.parametrize("family", FAMILIES)
def test_fork_equals_recomputed_prefix(family: str) -> None:
    actor = make(family)
    (forked, tokens), (recomputed, more) = rollouts(actor, "fork"), rollouts(actor, "prefix")
    assert not cpu_kernels_in_use()
    assert tokens == sum(LENGTHS) + forked.tokens.numel() < more, "documents are read once, and in one piece"
    assert torch.equal(forked.positions, recomputed.positions)
    assert torch.equal(forked.tokens, recomputed.tokens)
    assert forked.positions[0, 1] > 64 > forked.positions[0, 0]
    names = ("log_probs", "predicted_hidden", "target_hidden", "entropy_mean", "entropy_selected")
    found = errors(*({name: getattr(r, name) for name in names} for r in (forked, recomputed)))
    assert max(found.values()) < TOLERANCE, found

    branches, old = Branches(forked.positions, forked.tokens), forked.log_probs.flatten(0, 2)
    wanted = step(actor, branches, old, "prefix")
    found = errors(step(actor, branches, old, "fork"), wanted)
    assert max(found.values()) < TOLERANCE, found
    assert errors({"log_probs": wanted["log_probs"]}, {"log_probs": old})["log_probs"] < TOLERANCE

    one_token_too_many = Branches(forked.positions + 1, forked.tokens)
    found = errors(step(actor, one_token_too_many, old, "fork"), wanted)
    assert found["log_probs"] > WRONG and max(found.values()) > 10 * WRONG, found


def whole_step(actor: FastWeightActor, given: Documents, fused: bool, seed: int = 0) -> dict[str, Tensor]:
    """Rollouts, rewards, loss and the gradient of every parameter, in training mode as in a run."""
    actor.train().zero_grad()
    one, ids, output = Step(actor, NSP, seed), range(len(given)), None
    reward = HiddenStateRewardManager("cosine")
    if fused:
        written, output = one.on_policy(1, given, ids, reward)
    else:
        written = one.write_and_reward(1, given, ids, reward)
    written = {name: written[name] for name in ("positions", "rollout_tokens", "old_log_probs", "rewards")}
    written["advantages"] = group_standardise(written["rewards"])
    loss, _ = one.loss(
        given,
        written,
        LossSettings(rl_coef=0.7, sft_coef=1.0),
        output=output,
        policy_loss=ppo_clip_loss,
        global_tokens=given.predicted,
        global_rollouts=written["advantages"].numel(),
    )
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{name: values.float() for name, values in written.items()}, **gradients}


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("delta_net", "none"), ("delta_net", "layer"), ("gated_deltanet", "layer")],
)
def test_the_fused_step_is_the_step(family: str, checkpointing: str) -> None:
    assert_fused(make(family), documents(), checkpointing)


@pytest.mark.parametrize("family", ["gla", "hgrn2", "gated_deltaproduct", "kda"])
def test_the_fused_step_is_the_step_for_every_family(family: str) -> None:
    """One layer and one short document: interpreted kernels are slow."""
    assert_fused(make(family, layers=1), documents().split(1)[1], "none")


def assert_fused(actor: FastWeightActor, given: Documents, checkpointing: str) -> None:
    wanted = whole_step(actor, given, fused=False)
    actor.activation_checkpointing = checkpointing
    found = errors(whole_step(actor, given, fused=True), wanted)
    assert max(found.values()) < TOLERANCE, found
    found = errors(whole_step(actor, given, fused=True, seed=1), wanted)
    assert max(found.values()) > 10 * WRONG, found
