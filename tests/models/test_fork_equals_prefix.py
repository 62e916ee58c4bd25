"""Forking the state and recomputing every prefix agree, values and all gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from reference.toy import InPieces, InSegments, loss_of
from torch import Tensor

from refine_verl.config import ConfigError, NSPSettings
from refine_verl.models import (
    Branches,
    Documents,
    FastWeightActor,
    FastWeightState,
    RolloutDraws,
)
from refine_verl.models import adapters as adapters_module
from refine_verl.nsp import (
    RewardInputs,
    get_reward,
    group_standardise,
    position_uniforms,
    rollout_uniforms,
)

RELATIVE = 1e-9


ADAPTERS = {"trace": lambda: None, "segments": InSegments, "pieces": InPieces}


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents here are too short to be cut otherwise."""
    monkeypatch.setattr(adapters_module, "TOKENS_PER_PIECE", 64)


@pytest.fixture(params=ADAPTERS)
def make(make: Callable[..., FastWeightActor], request: pytest.FixtureRequest) -> Callable[..., FastWeightActor]:
    """All ways of reading a document."""
    return lambda **kwargs: make(adapter=ADAPTERS[request.param](), **kwargs)


NSP = NSPSettings(chunks=3, rollout_length=4, rollouts_per_position=2)


def documents_of(lengths: tuple[int, ...]) -> Documents:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 61, (len(lengths), max(lengths)), generator=generator)
    return Documents.from_tensors(tokens, lengths)


def draws_for(documents: Documents, nsp: NSPSettings) -> RolloutDraws:
    shape = (nsp.chunks, nsp.rollouts_per_position, nsp.rollout_length)
    rows = range(len(documents))
    return RolloutDraws(
        torch.stack([torch.from_numpy(position_uniforms(0, 1, b, nsp.chunks)) for b in rows]),
        torch.stack([torch.from_numpy(rollout_uniforms(0, 1, b, *shape)) for b in rows]),
    )


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()


def step(
    actor: FastWeightActor, documents: Documents, nsp: NSPSettings, branches: Branches, old: Tensor, advantages: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and parameter gradients of one update pass."""
    actor.zero_grad()
    output = actor(mode="update", documents=documents, branches=branches, nsp=nsp)
    loss = loss_of(output, documents, old, advantages)
    loss.backward()
    return (
        {"loss": loss.detach(), **{name: value.detach() for name, value in output.items()}},
        {name: parameter.grad.clone() for name, parameter in actor.named_parameters()},
    )


def assert_same_step(a: tuple[dict, dict], b: tuple[dict, dict]) -> None:
    for got, wanted in zip(a, b, strict=True):
        assert got.keys() == wanted.keys()
        worst = {name: relative(got[name], wanted[name]) for name in wanted}
        assert max(worst.values()) < RELATIVE, {k: v for k, v in worst.items() if v >= RELATIVE}


ENDS = tuple(range(30))
"""Half of the vocabulary: without suppression they would be written."""


@pytest.mark.parametrize("how", ["fork", "prefix"])
def test_suppressed_end_tokens_are_never_written_nor_counted(make: Callable[..., FastWeightActor], how: str) -> None:
    """Written and trained log-probabilities are those among the other tokens; they differ from the sampled ones'."""
    actor, documents = make(), documents_of((40, 33))
    actor.end_tokens = ENDS
    draws, found = draws_for(documents, NSP), {}
    for kind in ("sampled", "suppressed"):
        nsp = replace(NSP, rollout=how, end_tokens=kind)
        written = actor(mode="rollout", documents=documents, nsp=nsp, draws=draws, snapshots=24)
        branches = Branches(written.positions, written.tokens)
        trained = actor(mode="update", documents=documents, branches=branches, nsp=nsp)["log_probs"]
        assert relative(trained.detach().view(written.log_probs.shape), written.log_probs) < RELATIVE
        assert trained.isfinite().all()
        found[kind] = written
        plain = actor(mode="update", documents=documents, branches=branches, nsp=replace(nsp, end_tokens="sampled"))
        more = trained.detach() > plain["log_probs"].detach()  # what the end tokens had goes to the others
        assert more.all() if kind == "suppressed" else not more.any()
    assert (found["sampled"].tokens < len(ENDS)).any() and not (found["suppressed"].tokens < len(ENDS)).any()
    assert torch.equal(found["sampled"].positions, found["suppressed"].positions)


def test_suppression_needs_an_end_token(make: Callable[..., FastWeightActor]) -> None:
    actor, documents = make(), documents_of((40,))
    actor.end_tokens = ()
    with pytest.raises(ConfigError, match=r"refine\.nsp\.end_tokens: suppressed needs a model or a tokenizer"):
        actor(
            mode="rollout",
            documents=documents,
            nsp=replace(NSP, end_tokens="suppressed"),
            draws=draws_for(documents, NSP),
            snapshots=24,
        )


@pytest.mark.parametrize(
    "lengths", [(40,), (40, 33, 51), (7, 7), (150, 70, 200)], ids=["one", "unequal", "shortest", "several pieces"]
)
def test_rollouts_agree(make: Callable[..., FastWeightActor], lengths: tuple[int, ...]) -> None:
    actor, documents = make(), documents_of(lengths)
    draws = draws_for(documents, NSP)
    forked, recomputed = (
        actor(mode="rollout", documents=documents, nsp=replace(NSP, rollout=how), draws=draws, snapshots=24)
        for how in ("fork", "prefix")
    )
    assert torch.equal(forked.positions, recomputed.positions)
    assert torch.equal(forked.tokens, recomputed.tokens)
    for name in ("log_probs", "predicted_hidden", "target_hidden", "entropy_mean", "entropy_selected"):
        assert relative(getattr(forked, name), getattr(recomputed, name)) < RELATIVE, name
    for reward in ("cosine", "binary", "hybrid"):
        scores = [get_reward(reward)(reward_inputs(rollouts)) for rollouts in (forked, recomputed)]
        torch.testing.assert_close(*scores, rtol=RELATIVE, atol=1e-12)


def reward_inputs(rollouts: object) -> RewardInputs:
    copies = rollouts.tokens.shape[2]
    return RewardInputs(
        predicted_hidden=rollouts.predicted_hidden.flatten(0, 2),
        target_hidden=rollouts.target_hidden.repeat_interleave(copies, dim=1).flatten(0, 1),
        predicted_tokens=rollouts.tokens.flatten(0, 2),
        target_tokens=rollouts.target_tokens.repeat_interleave(copies, dim=1).flatten(0, 1),
    )


POSITIONS = {
    "first and last": [[0, 17, 35], [0, 15, 28]],
    "adjacent": [[11, 12, 13], [4, 5, 6]],
    "spread": [[3, 20, 31], [9, 14, 27]],
}


@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("grad_scope", ["full", "branch"])
@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
def test_updates_agree(make: Callable[..., FastWeightActor], where: str, grad_scope: str, checkpointing: str) -> None:
    documents = documents_of((40, 33))
    nsp = replace(NSP, grad_scope=grad_scope)
    branches, old, advantages = a_batch(where, nsp)
    forked = step(make(activation_checkpointing=checkpointing), documents, nsp, branches, old, advantages)
    wanted = step(make(), documents, replace(nsp, rollout="prefix"), branches, old, advantages)
    assert_same_step(forked, wanted)
    if checkpointing != "none":
        recomputing = step(
            make(activation_checkpointing=checkpointing),
            documents,
            replace(nsp, rollout="prefix"),
            branches,
            old,
            advantages,
        )
        assert_same_step(recomputing, wanted)


def a_batch(where: str, nsp: NSPSettings) -> tuple[Branches, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (2, nsp.chunks, nsp.rollouts_per_position, nsp.rollout_length)
    tokens = torch.randint(0, 61, shape, generator=generator)
    rewards = torch.rand(shape[:3], generator=generator, dtype=torch.float64)
    rows = shape[0] * shape[1] * shape[2]
    old = -4 + 0.1 * torch.randn(rows, nsp.rollout_length, generator=generator, dtype=torch.float64)
    return Branches(torch.tensor(POSITIONS[where]), tokens), old, group_standardise(rewards).flatten()


@pytest.mark.parametrize("rollouts, length", [(1, 1), (1, 4), (3, 2)])
def test_updates_agree_for_other_shapes(make: Callable[..., FastWeightActor], rollouts: int, length: int) -> None:
    nsp = replace(NSP, rollouts_per_position=rollouts, rollout_length=length)
    documents = documents_of((40, 33))
    batch = a_batch("spread", nsp)
    assert_same_step(
        step(make(), documents, nsp, *batch), step(make(), documents, replace(nsp, rollout="prefix"), *batch)
    )


def test_old_log_probs_are_those_of_the_update(make: Callable[..., FastWeightActor]) -> None:
    actor, documents = make(), documents_of((40, 33))
    rollouts = actor(mode="rollout", documents=documents, nsp=NSP, draws=draws_for(documents, NSP), snapshots=24)
    output = actor(mode="update", documents=documents, branches=Branches(rollouts.positions, rollouts.tokens), nsp=NSP)
    assert relative(output["log_probs"].detach(), rollouts.log_probs.flatten(0, 2)) < RELATIVE


def test_scope_matters(make: Callable[..., FastWeightActor]) -> None:
    """Negative control: the two scopes differ by far more than the tolerance."""
    documents, batch = documents_of((40, 33)), a_batch("spread", NSP)
    full = step(make(), documents, NSP, *batch)[1]
    branch = step(make(), documents, replace(NSP, grad_scope="branch"), *batch)[1]
    assert max(relative(branch[name], full[name]) for name in full) > 1e-3


def test_a_leaked_token_fails(make: Callable[..., FastWeightActor]) -> None:
    """Negative control: a state forked one token too late is caught."""
    documents, (branches, old, advantages) = documents_of((40, 33)), a_batch("spread", NSP)
    shifted = Branches(branches.positions + 1, branches.tokens)
    good = step(make(), documents, replace(NSP, rollout="prefix"), branches, old, advantages)
    bad = step(make(), documents, NSP, shifted, old, advantages)
    with pytest.raises(AssertionError):
        assert_same_step(bad, good)


def test_a_dropped_convolution_state_fails(
    make: Callable[..., FastWeightActor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: carrying the recurrent state alone is caught, in rollouts and in updates."""
    documents, batch = documents_of((40, 33)), a_batch("spread", NSP)
    draws = draws_for(documents, NSP)
    good = step(make(), documents, NSP, *batch)
    written = make()(mode="rollout", documents=documents, nsp=NSP, draws=draws, snapshots=24)
    original = adapters_module._fresh_layers

    def without_convolution(layers: tuple, clone_conv: bool) -> tuple:
        fresh = original(layers, clone_conv)
        return tuple(
            {**layer, "conv_state": tuple(torch.zeros_like(p) for p in layer["conv_state"])} for layer in fresh
        )

    monkeypatch.setattr(adapters_module, "_fresh_layers", without_convolution)
    with pytest.raises(AssertionError):
        assert_same_step(step(make(), documents, NSP, *batch), good)
    bad = make()(mode="rollout", documents=documents, nsp=NSP, draws=draws, snapshots=24)
    assert relative(bad.log_probs, written.log_probs) > 1e-3


def test_forks_are_independent(make: Callable[..., FastWeightActor]) -> None:
    """Decoding from one fork leaves its siblings and the original state untouched."""
    actor, documents = make(), documents_of((20, 20))
    _, state = actor.run(documents.cut([0, 0], [20, 20]), None, keep_state=True)
    assert isinstance(state, FastWeightState)
    before = [tensor.clone() for tensor in state.tensors]
    forks = state.fork(2)
    with torch.no_grad():
        column = documents.cut([3, 5], [4, 6])
        actor.run(column, state, keep_state=True)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(state.tensors, before, strict=True))
    assert forks.rows == 4
