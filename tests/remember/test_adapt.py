"""Training on what follows a document, from its state on, without reading it again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference.toy import NSP, draws_for, loss_of, relative
from torch import Tensor

import refine_verl
from refine_verl.adaptation import PromptError
from refine_verl.config import ConfigError, ModelError
from refine_verl.models import Branches, Documents, FastWeightActor, FastWeightState, make_actor
from refine_verl.remember import Memory

from .conftest import DOCUMENTS, WRITTEN, build, rows_of

# float64 rounding through two layers; another document's state is off by more than 1e-3
RELATIVE = 1e-9
TEXTS = (22, 31)
TRAINS: dict[str, Any] = {"steps": 3, "lr": 1e-2, "nsp": {"chunks": 3, "rollout_length": 4}}


def behind(states: list[FastWeightState], texts: list[Tensor]) -> Documents:
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return Documents.from_tensors(padded, [len(row) for row in texts], before=FastWeightState.stack(states))


def step(model: Any, documents: Documents, how: str, checkpointing: str = "none") -> dict[str, Tensor]:
    """Rollouts, the loss of an update with them, and the gradients of all parameters."""
    nsp, draws = replace(NSP, rollout=how), draws_for(range(len(documents)))
    actor = make_actor(model, activation_checkpointing=checkpointing)
    with torch.no_grad():
        rollouts = FastWeightActor.forward(
            actor, mode="rollout", documents=documents, nsp=nsp, draws=draws, snapshots=24
        )
    branches = Branches(rollouts.positions, rollouts.tokens)
    output = FastWeightActor.forward(actor, mode="update", documents=documents, branches=branches, nsp=nsp)
    advantages = torch.linspace(-1.0, 1.0, rollouts.log_probs[..., 0].numel(), dtype=torch.float64)
    loss = loss_of(output, documents, rollouts.log_probs.flatten(0, 2), advantages)
    parameters = dict(actor.named_parameters())
    # a parameter of the beginning alone may have none
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return {
        "positions": rollouts.positions.double(),
        "tokens": rollouts.tokens.double(),
        "written": rollouts.log_probs.double(),
        "hidden": rollouts.predicted_hidden.double(),
        "loss": loss.detach(),
        "ntp": output["ntp_loss_sum"].detach(),
        **{name: value for name, value in zip(parameters, found, strict=True)},
    }


def furthest(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(relative(got[name], wanted[name]) for name in wanted)


def test_forks_behind_a_state_are_prefixes_behind_it(family: str) -> None:
    model, documents, texts = build(family), rows_of(DOCUMENTS[:2], 3), rows_of(TEXTS, 7)
    states = list(refine_verl.remember(model, documents).states)
    wanted = step(model, behind(states, texts), "prefix")
    assert furthest(step(model, behind(states, texts), "fork"), wanted) < RELATIVE
    assert furthest(step(model, behind(states[::-1], texts), "fork"), wanted) > 1e-3
    alone = [step(model, behind([state], [text]), "fork") for state, text in zip(states, texts, strict=True)]
    assert relative(alone[0]["ntp"] + alone[1]["ntp"], wanted["ntp"]) < RELATIVE
    # of document and text read together, what the text predicts
    rows = [torch.cat(pair) for pair in zip(documents, texts, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    together = Documents(padded, tuple(map(len, rows)), tuple(len(row) + 1 for row in documents))
    with torch.no_grad():
        loss, _ = FastWeightActor.forward(make_actor(model), mode="score", documents=together)
    assert relative(wanted["ntp"], loss.sum()) < RELATIVE


@pytest.mark.parametrize("checkpointing", ["layer", "segment"])
def test_with_activation_checkpointing(checkpointing: str) -> None:
    model, documents, texts = build(), rows_of(DOCUMENTS[:2], 3), rows_of(TEXTS, 7)
    states = list(refine_verl.remember(model, documents).states)
    wanted = step(model, behind(states, texts), "prefix")
    assert furthest(step(model, behind(states, texts), "fork", checkpointing), wanted) < RELATIVE


def loss_from(memory: Memory, texts: list[Tensor]) -> float:
    with torch.no_grad():
        documents = behind(list(memory.states), texts)
        loss, _ = FastWeightActor.forward(make_actor(memory.model), mode="score", documents=documents)
    return float(loss.sum())


def test_it_learns_answers_and_is_as_before(family: str) -> None:
    model, texts = build(family), rows_of(TEXTS, 7)
    memory = refine_verl.remember(model, rows_of(DOCUMENTS[:2], 3))
    before, plain = {name: value.clone() for name, value in model.state_dict().items()}, loss_from(memory, texts)
    asked = memory.ask(texts, of=[0, 1], max_new_tokens=WRITTEN, stop_tokens=())
    with memory.adapt(texts, {"method": "none"}) as adapted:
        same = adapted.generate(max_new_tokens=WRITTEN, stop_tokens=())
    assert all(torch.equal(one, other.tokens) for one, other in zip(same, asked, strict=True))
    with memory.adapt(texts, TRAINS) as adapted:
        assert [entry["step"] for entry in adapted.history] == [1, 2, 3]
        losses = [entry["actor/ntp_loss"] for entry in adapted.history]
        assert losses[-1] < losses[0] and losses[0] == pytest.approx(plain / (sum(TEXTS) - 2))
        with pytest.raises(ModelError):
            memory.ask(texts, of=[0, 1], max_new_tokens=WRITTEN)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    again = memory.ask(texts, of=[0, 1], max_new_tokens=WRITTEN, stop_tokens=())
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(again, asked, strict=True))


@pytest.mark.parametrize("more", [{"lora_rank": 2}, {"on_policy": True}, {"method": "sft"}], ids=str)
def test_one_text_for_all_in_bfloat16(more: dict[str, Any]) -> None:
    model = build(dtype=torch.bfloat16)
    memory = refine_verl.remember(model, rows_of(DOCUMENTS, 3))
    with memory.adapt(rows_of((22,), 7), {**TRAINS, **more, "mini_batch_size": 2}) as adapted:
        losses = [entry["actor/ntp_loss"] for entry in adapted.history]
        assert len(adapted.generate(max_new_tokens=2)) == 3
    assert len(losses) == 6 and losses[-1] < losses[1]


def test_states_are_what_is_read_before(family: str) -> None:
    """`adapt` itself, with the states of others and none."""
    model, texts = build(family), rows_of(TEXTS, 7)
    memory = refine_verl.remember(model, rows_of(DOCUMENTS[:2], 3))

    def first_loss(states: Any) -> float:
        with refine_verl.adapt(model, texts, {**TRAINS, "steps": 1, "method": "sft"}, states=states) as adapted:
            return adapted.history[0]["actor/ntp_loss"]

    own = first_loss(memory.states)
    assert own == first_loss(memory.states)
    for others in (memory.states[::-1], memory.states[:1], None):
        assert abs(first_loss(others) / own - 1) > 1e-5  # one family forgets quickly


def test_refused() -> None:
    model = build()
    memory = refine_verl.remember(model, rows_of(DOCUMENTS, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PromptError, match="texts: 2 texts for 3 documents"):
        memory.adapt(rows_of(TEXTS, 7))
    with pytest.raises(PromptError, match="states: 3 for 2 prompts"):
        refine_verl.adapt(model, rows_of(TEXTS, 7), TRAINS, states=memory.states)
    with pytest.raises(PromptError, match="fewer than"):
        memory.adapt(rows_of((3,), 7))
    with pytest.raises(PromptError, match="no tokenizer"):
        memory.adapt("text")
    with pytest.raises(ConfigError, match=r"nsp\.selection.*surprise"):
        memory.adapt(rows_of((40,), 7), {**TRAINS, "nsp": {"chunks": 3, "selection": "surprise"}})
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(ModelError):
        memory.adapt(rows_of((40,), 7), TRAINS)
