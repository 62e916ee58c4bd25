"""The fused step: one pass that writes its rollouts and trains on them equals reading first and training afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models.test_fork_equals_prefix import (  # noqa: F401  the fixture
    ADAPTERS,
    NSP,
    RELATIVE,
    assert_same_step,
    documents_of,
    relative,
    short_pieces,
)
from torch import Tensor

from refine_verl.config import LossSettings, NSPSettings
from refine_verl.models import Documents, FastWeightActor
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step
from refine_verl.nsp import group_standardise, ppo_clip_loss

Make = Callable[..., FastWeightActor]
LENGTHS = {"one": (40,), "unequal": (40, 33, 51), "shortest": (7, 7), "long": (150, 70)}
REWARD = HiddenStateRewardManager("cosine")


@pytest.fixture(params=ADAPTERS)
def make(make: Make, request: pytest.FixtureRequest) -> Make:
    """All ways of reading a document."""
    return lambda **kwargs: make(adapter=ADAPTERS[request.param](), **kwargs)


Results = tuple[dict[str, Tensor], dict[str, Tensor]]


def step(actor: FastWeightActor, documents: Documents, nsp: NSPSettings, fused: bool, seed: int = 0) -> Results:
    """Rollouts, rewards and loss, and all gradients, of one mini-batch with one micro-batch."""
    actor.zero_grad()
    model_step, ids, output = Step(actor, nsp, seed), range(len(documents)), None
    if fused:
        rollouts, output = model_step.on_policy(1, documents, ids, REWARD)
    else:
        rollouts = model_step.write_and_reward(1, documents, ids, REWARD)
        rollouts["written_log_probs"] = rollouts["old_log_probs"]
    rollouts["advantages"] = group_standardise(rollouts["rewards"])
    loss, metrics = model_step.loss(
        documents,
        rollouts,
        LossSettings(rl_coef=0.7, sft_coef=1.0),
        output=output,
        policy_loss=ppo_clip_loss,
        global_tokens=documents.predicted,
        global_rollouts=rollouts["advantages"].numel(),
    )
    loss.backward()
    assert float(metrics["actor/ppo_kl"]) == 0 or not fused
    gradients = {name: parameter.grad.clone() for name, parameter in actor.named_parameters()}
    return {"loss": loss.detach(), **{name: values.double() for name, values in rollouts.items()}}, gradients


@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_fused_step_is_the_step(make: Make, lengths: tuple[int, ...], checkpointing: str) -> None:
    documents = documents_of(lengths)
    fused = step(make(activation_checkpointing=checkpointing), documents, NSP, fused=True)
    assert_same_step(fused, step(make(), documents, NSP, fused=False))


@pytest.mark.parametrize("changes", [{"grad_scope": "branch"}, {"rollout_length": 1}, {"rollouts_per_position": 8}])
def test_the_fused_step_is_the_step_for_other_settings(make: Make, changes: dict[str, object]) -> None:
    documents, nsp = documents_of((40, 33)), replace(NSP, **changes)
    assert_same_step(step(make(), documents, nsp, fused=True), step(make(), documents, nsp, fused=False))


def test_the_ratio_is_exactly_one(make: Make) -> None:
    actor, documents = make(), documents_of((40, 33))
    rollouts, output = Step(actor, NSP, 0).on_policy(1, documents, range(2), REWARD)
    assert torch.equal(rollouts["old_log_probs"].flatten(0, 2), output["log_probs"].detach())
    assert output["log_probs"].requires_grad and not any(values.requires_grad for values in rollouts.values())


def test_other_draws_differ(make: Make) -> None:
    """Negative control."""
    documents = documents_of((40, 33))
    one, other = (step(make(), documents, NSP, fused=True, seed=seed) for seed in (0, 1))
    assert max(relative(one[1][name], other[1][name]) for name in one[1]) > 1e-3 > RELATIVE


def test_micro_batches_do_not_matter(make: Make) -> None:
    """A document's rollouts and losses are its own: here each is a micro-batch of its own."""
    documents, actor = documents_of((40, 33, 51)), make()
    together, _ = Step(actor, NSP, 0).on_policy(1, documents, (5, 6, 7), REWARD)
    for b, document in enumerate(documents.split(1)):
        alone, _ = Step(actor, NSP, 0, longest=51).on_policy(1, document, (5 + b,), REWARD)
        for name, values in alone.items():
            torch.testing.assert_close(values[0], together[name][b], rtol=1e-9, atol=1e-9)


def test_training_flags_are_as_they_were(make: Make) -> None:
    """Rollouts are written in evaluation mode: fla has other kernels for single tokens then."""
    actor = make().train()
    frozen = actor.base_model.layers[0].eval()
    Step(actor, NSP, 0).on_policy(1, documents_of((40,)), (0,), REWARD)
    assert actor.training and actor.base_model.layers[1].training and not frozen.training


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_reading_in_segments_changes_no_result(make: Make, checkpointing: str) -> None:
    """`model.reading`: the same rollouts, losses and gradients, from more passes and tokens."""
    found = []
    for reading in ("whole", "segments"):
        actor, fused = make(activation_checkpointing=checkpointing, reading=reading), checkpointing == "layer"
        if checkpointing == "layer" and type(actor.adapter).__name__ == "InSegments":
            pytest.skip("its layers are not known")
        found.append((step(actor, documents_of((150, 70)), NSP, fused=fused), actor.forward_tokens))
    (whole, tokens), (cut, more) = found
    assert_same_step(whole, cut)
    assert tokens < more if type(actor.adapter).__name__ != "InSegments" else tokens == more


def test_tokens_through_the_model(make: Make) -> None:
    """S once; every rollout's k tokens once to write them and k - 1 to train on them; and no replay but in segments."""
    actor, documents = make(), documents_of((200,))
    step(actor, documents, NSP, fused=True)
    rollouts = NSP.chunks * NSP.rollouts_per_position
    written = rollouts * (2 * NSP.rollout_length - 1)
    if type(actor.adapter).__name__ == "InSegments":
        assert actor.forward_tokens > 2 * 200 + written
    else:
        assert actor.forward_tokens == 200 + written
