"""Many positions with many rollouts: in pieces the same numbers and gradients as at once, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models import test_fork_equals_prefix as forking
from models import test_on_policy as fused
from models.conftest import make_config
from models.test_fork_equals_prefix import (  # noqa: F401  the fixture
    ADAPTERS,
    NSP,
    RELATIVE,
    assert_same_step,
    documents_of,
    draws_for,
    relative,
    short_pieces,
)
from reference.live_bytes import LiveBytes

from refine_verl.config import NSPSettings
from refine_verl.models import Branches, FastWeightActor, FastWeightState, load_model, make_actor, snapshot_count
from refine_verl.models.pieces import even_sizes, piece_count, piece_sizes
from refine_verl.nsp import group_standardise

Make = Callable[..., FastWeightActor]
PIECES = {"of several positions": 5, "of one position": 2, "of one rollout": 1}
"""`refine.nsp.rollouts_together`, of 12 rollouts at 6 positions."""


@pytest.fixture(params=ADAPTERS)
def make_any(make: Make, request: pytest.FixtureRequest) -> Make:
    """All ways of reading a document."""
    return lambda **kwargs: make(adapter=ADAPTERS[request.param](), **kwargs)


@pytest.mark.parametrize("positions, copies", [(1, 1), (6, 2), (32, 8), (33, 3), (7, 100)])
@pytest.mark.parametrize("together", [1, 2, 5, 64, 256, 10**6])
def test_sizes(positions: int, copies: int, together: int) -> None:
    """Nothing is left out, no piece is too large, positions are divided first, and pieces are as equal as can be."""
    of_positions, of_copies = piece_sizes(positions, copies, together)
    assert sum(of_positions) == positions and sum(of_copies) == copies
    assert max(of_positions) * max(of_copies) <= together
    assert len(of_copies) == 1 or max(of_positions) == 1
    assert max(of_positions) - min(of_positions) <= 1 >= max(of_copies) - min(of_copies)
    assert piece_count(positions, copies, together) == len(of_positions) * len(of_copies)
    assert (piece_count(positions, copies, together) == 1) == (positions * copies <= together)
    assert even_sizes(10, 4) == [4, 3, 3]


@pytest.mark.parametrize("together", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("grad_scope", ["full", "branch"])
@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
def test_updates_agree(make_any: Make, together: int, grad_scope: str, checkpointing: str) -> None:
    documents, nsp = documents_of((40, 33)), replace(NSP, grad_scope=grad_scope)
    batch = forking.a_batch("adjacent", nsp)
    wanted = forking.step(make_any(), documents, nsp, *batch)
    actor = make_any(activation_checkpointing=checkpointing)
    assert_same_step(forking.step(actor, documents, replace(nsp, rollouts_together=together), *batch), wanted)


@pytest.mark.parametrize("changes", [{"rollout_length": 1}, {"rollouts_per_position": 1}, {"rollouts_per_position": 7}])
def test_updates_agree_for_other_shapes(make: Make, changes: dict[str, int]) -> None:
    documents, nsp = documents_of((40, 33)), replace(NSP, **changes)
    batch = forking.a_batch("spread", nsp)
    wanted = forking.step(make(), documents, nsp, *batch)
    assert_same_step(forking.step(make(), documents, replace(nsp, rollouts_together=3), *batch), wanted)


@pytest.mark.parametrize("together", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
@pytest.mark.parametrize("on_policy", [False, True], ids=["two phases", "fused"])
def test_whole_steps_agree(make: Make, together: int, checkpointing: str, on_policy: bool) -> None:
    """Written, rewarded and trained in pieces."""
    documents, nsp = documents_of((40, 33, 51)), replace(NSP, rollouts_together=together)
    wanted = fused.step(make(), documents, NSP, fused=False)
    assert_same_step(fused.step(make(activation_checkpointing=checkpointing), documents, nsp, fused=on_policy), wanted)


def test_a_piece_whose_gradient_is_lost_fails(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the last piece ends at its states, and their gradients never enter the trunk."""
    documents, nsp, batch = documents_of((40, 33)), replace(NSP, rollouts_together=5), forking.a_batch("spread", NSP)
    wanted = forking.step(make(), documents, NSP, *batch)
    split = FastWeightState.split
    monkeypatch.setattr(FastWeightState, "split", lambda *args: [*(parts := split(*args))[:-1], parts[-1].detach()])
    with pytest.raises(AssertionError):
        assert_same_step(forking.step(make(), documents, nsp, *batch), wanted)


MANY = NSPSettings(chunks=32, rollouts_per_position=8, rollout_length=4, rollouts_together=64)


def overlapping(lengths: tuple[int, ...]) -> Branches:
    """Positions that are mostly nearer to each other than k, the first and the last valid one among them."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for length in lengths:
        last = length - 1 - MANY.rollout_length
        between = torch.randperm(last - 1, generator=generator)[: MANY.chunks - 2] + 1
        rows.append(torch.cat([torch.tensor([0, last]), between]).sort().values)
    shape = (len(lengths), MANY.chunks, MANY.rollouts_per_position, MANY.rollout_length)
    return Branches(torch.stack(rows), torch.randint(0, 61, shape, generator=generator))


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_many_positions_are_recomputed_prefixes(make: Make, checkpointing: str) -> None:
    """c = 32 and n = 8; with a state one token too late as the control."""
    lengths = (48, 39)
    documents, branches = documents_of(lengths), overlapping(lengths)
    assert (branches.positions.diff() < MANY.rollout_length).float().mean() > 0.9
    generator = torch.Generator().manual_seed(5)
    count = branches.tokens[..., 0].numel()
    old = -4 + 0.1 * torch.randn(count, MANY.rollout_length, generator=generator, dtype=torch.float64)
    rewards = torch.rand(branches.tokens.shape[:3], generator=generator, dtype=torch.float64)
    rest = (old, group_standardise(rewards, "position").flatten())
    prefix = replace(MANY, rollout="prefix")
    wanted = forking.step(make(), documents, prefix, branches, *rest)
    assert_same_step(
        forking.step(make(activation_checkpointing=checkpointing), documents, MANY, branches, *rest), wanted
    )
    shifted = Branches(branches.positions + 1, branches.tokens)
    with pytest.raises(AssertionError):
        assert_same_step(forking.step(make(), documents, MANY, shifted, *rest), wanted)


def test_many_rollouts_are_recomputed_prefixes(make: Make) -> None:
    """Written in 8 pieces, at positions that were selected in chunks shorter than k."""
    documents = documents_of((48, 39))
    draws, actor = draws_for(documents, MANY), make()
    forked, recomputed = (
        actor(mode="rollout", documents=documents, nsp=replace(MANY, rollout=how), draws=draws, snapshots=39)
        for how in ("fork", "prefix")
    )
    assert torch.equal(forked.positions, recomputed.positions)
    assert (forked.positions.diff() < MANY.rollout_length).any()
    assert torch.equal(forked.tokens, recomputed.tokens)
    assert torch.equal(forked.target_tokens, recomputed.target_tokens)
    for name in ("log_probs", "predicted_hidden", "target_hidden"):
        assert relative(getattr(forked, name), getattr(recomputed, name)) < RELATIVE, name


def peak_bytes(actor: FastWeightActor, nsp: NSPSettings, length: int) -> int:
    documents, where = documents_of((length,)), torch.arange(1, 1 + nsp.chunks)[None]
    tokens = torch.zeros(1, nsp.chunks, nsp.rollouts_per_position, nsp.rollout_length, dtype=torch.int64)
    with LiveBytes() as live:
        output = actor(mode="update", documents=documents, branches=Branches(where, tokens), nsp=nsp)
        (output["ntp_loss_sum"] + output["log_probs"].sum()).backward()
    return live.peak


@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
def test_pieces_need_less_memory(make: Make, checkpointing: str) -> None:
    """256 forks at once, and 16 at a time: what is left is mostly the document's."""
    length = 64
    whole, pieces = (
        peak_bytes(make(activation_checkpointing=checkpointing), replace(MANY, rollouts_together=together), length)
        for together in (256, 16)
    )
    assert pieces < 0.4 * whole


LONG = 16_384
WEIGHTS = {"forward": 1, "trained": 3}


def price(actor: FastWeightActor, chunks: int, copies: int) -> float:
    """What a step with two phases on a document of 16,384 tokens costs: tokens forward once, those trained three times.

    Trained tokens are the document's and k - 1 of each rollout; whatever else goes through the model is forward only.
    """
    nsp = NSPSettings(chunks=chunks, rollouts_per_position=copies, rollout_length=5)
    documents = documents_of((LONG,))
    draws = draws_for(documents, nsp)
    actor.forward_tokens = 0
    written = actor(mode="rollout", documents=documents, nsp=nsp, draws=draws, snapshots=snapshot_count(chunks, LONG))
    branches = Branches(written.positions, written.tokens)
    output = actor(mode="update", documents=documents, branches=branches, nsp=nsp)
    (output["ntp_loss_sum"] + output["log_probs"].sum()).backward()
    trained = LONG + chunks * copies * (nsp.rollout_length - 1)
    return WEIGHTS["trained"] * trained + WEIGHTS["forward"] * (actor.forward_tokens - trained)


def test_256_rollouts_of_a_long_document_cost_little() -> None:
    """c = 32 and n = 8 at T = 16,384 instead of c = 8 and n = 1: at most 12% of an SFT step more.

    An SFT step trains T tokens: 3 T. The pieces, computed twice, are in the price.
    """
    config = make_config("delta_net", num_hidden_layers=1, hidden_size=16, num_heads=1)
    actor = make_actor(load_model(None, config=config))
    sft = WEIGHTS["trained"] * LONG
    few, many = price(actor, 8, 1), price(actor, 32, 8)
    assert few == 4 * LONG + 8 * (5 + 3 * 4)
    assert many == 4 * LONG + 256 * (5 + 3 * 4 + 4)
    assert many - few <= 0.12 * sft
    assert many <= 1.12 * few


def test_the_split_of_a_state_is_its_rows() -> None:
    tree = {"a": torch.arange(10.0).view(5, 2), "b": [None, torch.arange(5.0)]}
    parts = FastWeightState(tree).split([2, 3])
    assert [part.rows for part in parts] == [2, 3]
    again = FastWeightState.stack(parts).tree
    assert torch.equal(again["a"], tree["a"]) and again["b"][0] is None and torch.equal(again["b"][1], tree["b"][1])
    assert parts[1].tensors[0].untyped_storage().data_ptr() == tree["a"].untyped_storage().data_ptr()
