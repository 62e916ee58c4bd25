"""LaCT: forking and recomputing every prefix agree, across chunk and window boundaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from reference.toy import NSP, documents_of, draws_for, gradients, relative, share_of_loss
from torch import Tensor

from refine_verl.config import NSPSettings
from refine_verl.models import Branches, FastWeightActor, FastWeightState, snapshot_count
from refine_verl.models.lact import LaCTAdapter, LaCTState
from refine_verl.models.state import RowLeaf
from refine_verl.nsp import group_standardise

RELATIVE = 1e-9
LENGTHS = (40, 33)
# the chunks of most variants have 8 tokens: x_t is the last but one, the last, the first of a chunk
POSITIONS = {
    "around the first boundary": [[6, 7, 8], [6, 7, 8]],
    "around later boundaries": [[14, 15, 16], [22, 23, 24]],
    "first and last": [[0, 17, 35], [0, 15, 28]],
    "within a chunk": [[9, 11, 13], [17, 18, 21]],
    "spread": [[4, 20, 31], [9, 14, 27]],
}


class InSegments(LaCTAdapter):
    """Without the trace: documents are read in segments and states are carried or replayed."""

    trace = None  # type: ignore[assignment]


def batch(where: str, nsp: NSPSettings) -> tuple[Branches, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (2, nsp.chunks, nsp.rollouts_per_position, nsp.rollout_length)
    tokens = torch.randint(0, 61, shape, generator=generator)
    rewards = torch.rand(shape[:3], generator=generator, dtype=torch.float64)
    rows = shape[0] * shape[1] * shape[2]
    old = -4 + 0.1 * torch.randn(rows, nsp.rollout_length, generator=generator, dtype=torch.float64)
    return Branches(torch.tensor(POSITIONS[where]), tokens), old, group_standardise(rewards).flatten()


def step(actor: FastWeightActor, nsp: NSPSettings, where: str) -> dict[str, Tensor]:
    """Loss and all gradients."""
    branches, old, advantages = batch(where, nsp)
    loss = share_of_loss(actor, documents_of(LENGTHS), branches, old, advantages, (71, len(old)), nsp)
    return {"loss": loss, **gradients(actor)}


def differences(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == wanted.keys()
    return {name: relative(got[name], wanted[name]) for name in wanted}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    worst = differences(got, wanted)
    assert max(worst.values()) < RELATIVE, {k: v for k, v in worst.items() if v >= RELATIVE}


WAYS: dict[str, dict[str, object]] = {
    "trace": {},
    "layers again": {"activation_checkpointing": "layer"},
    "segments": {"adapter": InSegments()},
    "segments again": {"adapter": InSegments(), "activation_checkpointing": "segment"},
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("together", [1, 5])
@pytest.mark.parametrize("variant", ["post-norm, muon", "whole window"], indirect=True)
def test_pieces_agree(make: Callable[..., FastWeightActor], together: int, how: str) -> None:
    """`refine.nsp.rollouts_together`: 12 rollouts in 12 pieces and in 3."""
    got = step(make(**WAYS[how]), replace(NSP, rollouts_together=together), "around the first boundary")
    assert_same(got, step(make(), NSP, "around the first boundary"))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("where", POSITIONS)
@pytest.mark.parametrize("variant", ["post-norm, muon"], indirect=True)
def test_updates_agree(make: Callable[..., FastWeightActor], where: str, how: str) -> None:
    forked = step(make(**WAYS[how]), NSP, where)
    assert_same(forked, step(make(), replace(NSP, rollout="prefix"), where))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("scope", ["full", "branch"])
def test_updates_of_every_variant_agree(make: Callable[..., FastWeightActor], scope: str, how: str) -> None:
    nsp = replace(NSP, grad_scope=scope, rollout_length=5)
    forked = step(make(**WAYS[how]), nsp, "around later boundaries")
    assert_same(forked, step(make(), replace(nsp, rollout="prefix"), "around later boundaries"))


@pytest.mark.parametrize("how", ["trace", "segments"])
@pytest.mark.parametrize("lengths", [(40,), (40, 33, 51), (7, 7), (8, 16)], ids=str)
def test_rollouts_agree(make: Callable[..., FastWeightActor], lengths: tuple[int, ...], how: str) -> None:
    actor, documents = make(adapter=None if how == "trace" else InSegments()), documents_of(lengths)
    nsp = replace(NSP, chunks=2)
    draws = draws_for(range(len(lengths)), nsp)
    forked, recomputed = (
        actor(
            mode="rollout",
            documents=documents,
            nsp=replace(nsp, rollout=kind),
            draws=draws,
            snapshots=snapshot_count(2, max(lengths)),
        )
        for kind in ("fork", "prefix")
    )
    assert torch.equal(forked.positions, recomputed.positions)
    assert torch.equal(forked.tokens, recomputed.tokens)
    for name in ("log_probs", "predicted_hidden", "target_hidden", "entropy_mean", "entropy_selected"):
        assert relative(getattr(forked, name), getattr(recomputed, name)) < RELATIVE, name


@pytest.mark.parametrize("part", ["fast", "window", "open"])
@pytest.mark.parametrize("variant", ["pre-norm"], indirect=True)
def test_a_state_with_a_part_missing_is_caught(
    make: Callable[..., FastWeightActor], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: forks need the fast weights, the window, and for the next boundary the open chunk."""
    wanted = step(make(), replace(NSP, rollout="prefix"), "around later boundaries")
    original = LaCTState.select

    def forgetful(self: LaCTState, indices: list[int]) -> RowLeaf:
        selected = original(self, indices)
        tensors = [getattr(layer, part) for layer in selected.layers]
        wrong = {id(t) for t in torch.utils._pytree.tree_leaves(tensors)}
        return selected.rebuild([torch.zeros_like(t) if id(t) in wrong else t for t in selected.tensors])

    monkeypatch.setattr(LaCTState, "select", forgetful)
    assert max(differences(step(make(), NSP, "around later boundaries"), wanted).values()) > 1e-3


@pytest.mark.parametrize("variant", ["post-norm, muon"], indirect=True)
def test_scope_matters(make: Callable[..., FastWeightActor]) -> None:
    """Negative control: the two scopes differ by far more than the tolerance."""
    one, other = (step(make(), replace(NSP, grad_scope=scope), "spread") for scope in ("full", "branch"))
    assert max(differences(other, one).values()) > 1e-3


@pytest.mark.parametrize("variant", ["post-norm, muon"], indirect=True)
def test_forks_share_what_they_have_in_common(make: Callable[..., FastWeightActor]) -> None:
    actor, documents = make(), documents_of((40, 33))
    with torch.no_grad():
        _, trace = actor.adapter.trace(actor, documents)
        state = trace.after(torch.tensor([[17, 18, 22], [17, 30, 31]]))
        forks = state.fork(4)
    assert (state.rows, forks.rows) == (6, 24)
    held = {id(tensor) for tensor in state.tensors}
    assert {id(tensor) for tensor in forks.tensors} == held
    tree = state.tree
    # two chunks are in use, for both documents at once
    assert [len(layer.fast) for layer in tree.layers] == [2, 2]
    traced = {id(w) for layer in trace.layers for lot in layer.lots for w in lot.used}
    assert all(id(w) in traced for layer in tree.layers for lot in layer.fast for w in lot.used)
    assert all(layer.open[0].k is mine.tokens.k for layer, mine in zip(tree.layers, trace.layers, strict=True))


@pytest.mark.parametrize("variant", ["pre-norm"], indirect=True)
def test_forks_are_independent(make: Callable[..., FastWeightActor]) -> None:
    """Decoding from a fork, across a boundary, leaves its siblings and the original state untouched."""
    actor, documents = make(), documents_of((20, 20))
    with torch.no_grad():
        _, state = actor.run(documents.cut([0, 0], [15, 15]), None, keep_state=True)
        assert isinstance(state, FastWeightState)
        before = [tensor.clone() for tensor in state.tensors]
        fork, other = state.select([0, 0]), state.select([0, 0])
        first, _ = actor.run(documents.cut([3, 5], [4, 6]), other, keep_state=True)
        for place in range(3, 9):
            _, fork = actor.run(documents.cut([place] * 2, [place + 1] * 2), fork, keep_state=True)
        again, _ = actor.run(documents.cut([3, 5], [4, 6]), other, keep_state=True)
    assert torch.equal(first, again)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(state.tensors, before, strict=True))
