"""Hybrids: forking and recomputing every prefix agree, values and all gradients; and with the models' own forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from reference.answers import compare_answers
from reference.hybrid import InPieces, InSegments
from reference.toy import NSP, documents_of, draws_for, gradients, one_by_one, relative, share_of_loss
from torch import Tensor

from refine_verl.config import NSPSettings
from refine_verl.models import Branches, Documents, FastWeightActor, snapshot_count
from refine_verl.models.hybrid import SharedKeys
from refine_verl.models.hybrid import attention as attention_module
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step
from refine_verl.nsp import group_standardise

pytestmark = pytest.mark.usefixtures("in_float64")
Make = Callable[..., FastWeightActor]
RELATIVE = 1e-9
LENGTHS = (70, 33)
POSITIONS = {"first and last": [[0, 37, 65], [0, 15, 28]], "adjacent": [[11, 12, 13], [4, 5, 6]]}
WAYS: dict[str, Callable[[], dict[str, object]]] = {
    "trace": lambda: {},
    "pieces": lambda: {"adapter": InPieces()},
    "layers again": lambda: {"activation_checkpointing": "layer"},
    "pieces, layers again": lambda: {"adapter": InPieces(), "activation_checkpointing": "layer"},
    "segments": lambda: {"adapter": InSegments()},
    "segments again": lambda: {"activation_checkpointing": "segment"},
}


def step(actor: FastWeightActor, nsp: NSPSettings, where: str, documents: Documents | None = None) -> dict[str, Tensor]:
    """Loss and all gradients."""
    generator = torch.Generator().manual_seed(5)
    shape = (2, nsp.chunks, nsp.rollouts_per_position, nsp.rollout_length)
    tokens = torch.randint(0, 61, shape, generator=generator)
    rewards = torch.rand(shape[:3], generator=generator, dtype=torch.float64)
    rows = shape[0] * shape[1] * shape[2]
    old = -4 + 0.1 * torch.randn(rows, nsp.rollout_length, generator=generator, dtype=torch.float64)
    branches = Branches(torch.tensor(POSITIONS[where]), tokens)
    documents = documents or documents_of(LENGTHS)
    advantages = group_standardise(rewards).flatten()
    loss = share_of_loss(actor, documents, branches, old, advantages, (101, len(old)), nsp)
    return {"loss": loss, **gradients(actor)}


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(relative(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("where", POSITIONS)
def test_updates_agree(make: Make, where: str) -> None:
    """All ways of reading, two scopes of the gradient, and pieces of rollouts, against prefixes read on their own."""
    for nsp in (NSP, replace(NSP, grad_scope="branch", rollouts_per_position=8, rollout_length=3)):
        wanted = step(make(), replace(nsp, rollout="prefix"), where)
        for together in (nsp.rollouts_together, 5):
            taken = replace(nsp, rollouts_together=together)
            found = {name: worst(step(make(**how()), taken, where), wanted) for name, how in WAYS.items()}
            assert max(found.values()) < RELATIVE, found


def test_the_scope_matters(make: Make) -> None:
    """Negative control: the two scopes differ by far more than the tolerance."""
    one, other = (step(make(), replace(NSP, grad_scope=scope), "adjacent") for scope in ("full", "branch"))
    assert worst(other, one) > 1e-3


@pytest.mark.parametrize("lengths", [(70,), (150, 33, 51), (7, 7)], ids=str)
def test_rollouts_agree(make: Make, lengths: tuple[int, ...]) -> None:
    documents, draws = documents_of(lengths), draws_for(range(len(lengths)))
    how = {"documents": documents, "draws": draws, "snapshots": snapshot_count(NSP.chunks, max(lengths))}
    wanted = make()(mode="rollout", nsp=replace(NSP, rollout="prefix"), **how)
    for kwargs in ({}, {"adapter": InPieces()}, {"reading": "segments"}):
        forked = make(**kwargs)(mode="rollout", nsp=NSP, **how)
        assert torch.equal(forked.positions, wanted.positions) and torch.equal(forked.tokens, wanted.tokens)
        for name in ("log_probs", "predicted_hidden", "target_hidden", "entropy_mean", "entropy_selected"):
            assert relative(getattr(forked, name), getattr(wanted, name)) < RELATIVE, name


@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
def test_the_fused_step_is_the_step(make: Make, checkpointing: str) -> None:
    documents, reward, found = documents_of(LENGTHS), HiddenStateRewardManager("cosine"), []
    for fused in (True, False):
        actor = make(activation_checkpointing=checkpointing if fused else "none")
        model_step, output = Step(actor, NSP, 0), None
        if fused:
            rollouts, output = model_step.on_policy(1, documents, range(2), reward)
        else:
            rollouts = model_step.write_and_reward(1, documents, range(2), reward)
            output = actor(
                mode="update",
                documents=documents,
                branches=Branches(rollouts["positions"], rollouts["rollout_tokens"]),
                nsp=NSP,
            )
        (output["ntp_loss_sum"] + (output["log_probs"] * rollouts["rewards"].flatten()[:, None]).sum()).backward()
        found.append({"log_probs": output["log_probs"].detach(), **gradients(actor)})
    assert worst(*found) < RELATIVE


def test_every_token_is_read_once(make: Make) -> None:
    """S once for rollouts and once for the update, the same with layers run again but for that; nothing replayed."""
    documents = documents_of((150,))
    rollouts = NSP.chunks * NSP.rollouts_per_position
    written, trained = 150 + rollouts * NSP.rollout_length, 150 + rollouts * (NSP.rollout_length - 1)
    for kwargs, times in (({}, 1), ({"adapter": InPieces()}, 1), ({"activation_checkpointing": "layer"}, 2)):
        actor = make(**kwargs)
        found = actor(mode="rollout", documents=documents, nsp=NSP, draws=draws_for([0]), snapshots=24)
        assert actor.forward_tokens == written
        actor(mode="update", documents=documents, branches=Branches(found.positions, found.tokens), nsp=NSP)
        assert actor.forward_tokens == written + times * trained


def test_packed_documents_are_those_of_the_models_own_forward(make: Make) -> None:
    """Read alone, by transformers' code: hidden states and gradients."""
    actor, plain, documents = make(), make(), documents_of((60, 41, 7))
    hidden, _ = actor.run(documents.whole, None, keep_state=False)
    alone = [plain.base_model(input_ids=one.tokens).last_hidden_state[0] for one in one_by_one(documents)]
    assert relative(hidden, torch.cat(alone)) < RELATIVE
    hidden.square().sum().backward()
    torch.cat(alone).square().sum().backward()
    ours, theirs = ({n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (actor, plain))
    assert worst(ours, theirs) < RELATIVE


def test_a_document_does_not_reach_its_neighbours(make: Make, family: str) -> None:
    """Bit for bit, in the pass and in its state; the changed one does change.

    How many tokens an expert is given decides how its product is rounded, so with experts there is a last bit.
    """
    actor, documents = make(), documents_of((60, 41, 50))
    other = Documents(documents.tokens.clone(), documents.lengths)
    other.tokens[0] = (other.tokens[0] + 1) % 61
    found = []
    with torch.no_grad():
        for some in (documents, other):
            hidden, state = actor.run(some.whole, None, keep_state=True)
            assert state is not None
            column = some.cut([0, 3, 5], [4, 4, 9])
            again, _ = actor.run(column, state, keep_state=False)
            found.append((hidden.split(some.lengths), again.split(column.lengths)))
    for one, two in zip(*found, strict=True):
        assert not torch.equal(one[0], two[0])
        for a, b in zip(one[1:], two[1:], strict=True):
            assert torch.equal(a, b) or (family == "experts" and relative(a, b) < 1e-13)


def _one_too_many(keys: SharedKeys, sequences: list[int], positions: list[int]) -> SharedKeys:
    return CUT(keys, sequences, [position + 1 for position in positions])


def _without_the_tail(keys: SharedKeys, lengths: list[int], made: object) -> SharedKeys:
    longer = EXTENDED(keys, lengths, made)
    return SharedKeys(tuple(row[:1] for row in longer.stretches), longer.layers)


CUT, EXTENDED, GROUP = SharedKeys.cut_at, SharedKeys.extended, attention_module.Group.of


def _all_of_the_group(*args: object) -> attention_module.Group:
    group = GROUP(*args)
    if group.mask is None or not group.spans:
        return group
    mask = group.mask.clone()
    mask[:, : sum(stop - first for _, first, stop in group.spans)] = True  # also what comes after the fork
    return replace(group, mask=mask)


FAULTS = {
    "mask off by one": (SharedKeys, "cut_at", _one_too_many),
    "tail not seen": (SharedKeys, "extended", _without_the_tail),
    "a neighbour's keys seen": (attention_module.Group, "of", staticmethod(_all_of_the_group)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", ["olmo_hybrid", "qwen3_5_text"], indirect=True)
def test_wrong_keys_are_caught(make: Make, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls of every comparison above."""
    documents, draws = documents_of(LENGTHS), draws_for(range(2))
    how = {"documents": documents, "draws": draws, "snapshots": 24}
    good = make()(mode="rollout", nsp=replace(NSP, rollout="prefix"), **how)
    owner, name, wrong = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    bad = make()(mode="rollout", nsp=NSP, **how)
    assert relative(bad.predicted_hidden, good.predicted_hidden) > 1e-4


@pytest.mark.parametrize("segments", [1, 5])
def test_answers_are_those_of_plain_passes(make: Make, segments: int) -> None:
    """Written from one read prompt each, of unequal length; log-probabilities and gradients."""
    actor, plain = make(activation_checkpointing="segment"), make()
    how = {"copies": 2, "width": 11, "segments": segments, "tolerance": RELATIVE}
    compare_answers(actor, plain, documents_of((3, 17, 24)), (11, 2, 9), **how)
