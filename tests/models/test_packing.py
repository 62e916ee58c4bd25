"""Documents in one packed batch do not see each other, and packing changes nothing but the speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from reference.toy import (
    NSP,
    VOCABULARY,
    InSegments,
    documents_of,
    draws_for,
    gradients,
    one_by_one,
    relative,
    share_of_loss,
)
from torch import Tensor

from refine_verl.config import NSPSettings
from refine_verl.models import (
    Branches,
    Documents,
    FastWeightActor,
    Packed,
    RolloutBatch,
    documents_together,
    pack,
    snapshot_count,
)

Make = Callable[..., FastWeightActor]
LENGTHS = (40, 33, 51)
SNAPSHOTS = snapshot_count(NSP.chunks, max(LENGTHS))


def roll(actor: FastWeightActor, documents: Documents, ids: list[int], nsp: NSPSettings = NSP) -> RolloutBatch:
    return actor(mode="rollout", documents=documents, nsp=nsp, draws=draws_for(ids), snapshots=SNAPSHOTS)


def values(rollouts: RolloutBatch) -> dict[str, Tensor]:
    each = {field.name: getattr(rollouts, field.name) for field in fields(rollouts)}
    return {name: value for name, value in each.items() if value is not None}


@pytest.mark.parametrize("lengths", [LENGTHS, (40, 40, 40)], ids=["unequal", "equal"])
def test_rollouts_packed_are_those_of_each_document_alone(make: Make, lengths: tuple[int, ...]) -> None:
    actor, documents = make(), documents_of(lengths)
    together = values(roll(actor, documents, [0, 1, 2]))
    alone = [values(roll(actor, document, [b])) for b, document in enumerate(one_by_one(documents))]
    for name, got in together.items():
        wanted = torch.cat([part[name] for part in alone])
        if got.dtype == torch.int64:
            assert torch.equal(got, wanted), name
        else:
            assert relative(got, wanted) < 1e-10, name


@pytest.mark.parametrize("how", ["traced", "in_segments", "prefix"])
def test_rollouts_of_documents_read_one_after_another_are_written_together(
    make: Make, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read alone or two at a time: the same rollouts, and k passes for all of them."""

    actor = make(adapter=InSegments()) if how == "in_segments" else make()
    nsp = replace(NSP, rollout="prefix") if how == "prefix" else NSP
    documents, draws = documents_of((*LENGTHS, 40)), draws_for([0, 1, 2, 3])
    passes: list[int] = []
    run = FastWeightActor.run

    def counting(actor: FastWeightActor, packed: Packed, *rest: Any, **options: Any) -> Any:
        passes.append(packed.tokens.numel())
        return run(actor, packed, *rest, **options)

    monkeypatch.setattr(FastWeightActor, "run", counting)
    results, decoding = [], []
    for size in (1, 2, 3, None):
        passes.clear()
        options = {"nsp": nsp, "draws": draws, "snapshots": SNAPSHOTS, "read_together": size}
        results.append(values(actor(mode="rollout", documents=documents, **options)))
        decoding.append([tokens for tokens in passes if tokens == len(draws.tokens.flatten(0, 2))])
    if how != "prefix":
        assert all(len(steps) == NSP.rollout_length for steps in decoding)
    for name, wanted in results[-1].items():
        for got in results[:-1]:
            assert relative(got[name].double(), wanted.double()) < 1e-10, name
    other = values(roll(actor, documents, [3, 2, 1, 0], nsp))  # the control: draws of other documents
    assert not torch.equal(other["tokens"], results[0]["tokens"])


def test_of_how_many_documents_rollouts_are_written_together() -> None:
    assert documents_together(NSPSettings(chunks=8), 1) == 8
    assert documents_together(NSPSettings(chunks=8), 3) == 6  # a multiple of what is read in one pass
    assert documents_together(NSPSettings(chunks=8, rollouts_per_position=4), 1) == 2
    assert documents_together(NSPSettings(chunks=64), 1) == documents_together(NSPSettings(chunks=100), 1) == 1
    assert documents_together(NSPSettings(chunks=8), 20) == 20  # what may be read together may be written together
    assert documents_together(NSPSettings(chunks=8, rollout="prefix"), 1) == 1


@pytest.mark.parametrize("lengths", [LENGTHS, (40, 40, 40)], ids=["unequal", "equal"])
def test_scores_packed_are_those_of_each_document_alone(make: Make, lengths: tuple[int, ...]) -> None:
    actor, documents = make(), documents_of(lengths)
    loss, correct = actor(mode="score", documents=documents)
    alone = [actor(mode="score", documents=document) for document in one_by_one(documents)]
    torch.testing.assert_close(loss, torch.cat([part[0] for part in alone]), rtol=1e-10, atol=0)
    assert torch.equal(correct, torch.cat([part[1] for part in alone]))


def test_scores_are_the_losses_and_argmaxes_of_the_plain_model(make: Make) -> None:
    actor, documents = make(), documents_of(LENGTHS)
    loss, correct = actor(mode="score", documents=documents)
    for b, document in enumerate(one_by_one(documents)):
        with torch.no_grad():
            logits = actor(input_ids=document.tokens).logits[0, :-1]
        targets = document.tokens[0, 1:]
        wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        torch.testing.assert_close(loss[b], wanted, rtol=1e-10, atol=0)
        assert correct[b] == (logits.argmax(-1) == targets).sum()


def mini_batch(documents: Documents) -> tuple[Branches, Tensor, Tensor, tuple[int, int]]:
    """Rollouts at fixed places, old log-probs, advantages, and the mini-batch's totals."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(documents), NSP.chunks, NSP.rollouts_per_position, NSP.rollout_length)
    positions = torch.tensor([[3, 20, 31], [0, 14, 28], [9, 10, 46]])[: len(documents)]
    tokens = torch.randint(0, VOCABULARY, shape, generator=generator)
    old = -4 + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(shape[:3], generator=generator, dtype=torch.float64)
    totals = (documents.total - len(documents), advantages.numel())
    return Branches(positions, tokens), old, advantages, totals


def accumulate(
    actor: FastWeightActor, documents: Documents, split: list[list[int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a mini-batch, micro-batch by micro-batch."""
    branches, old, advantages, totals = mini_batch(documents)
    actor.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for rows in split:
        part = Documents.from_tensors(documents.tokens[rows], [documents.lengths[b] for b in rows])
        forks = Branches(branches.positions[rows], branches.tokens[rows])
        loss += share_of_loss(actor, part, forks, old[rows].flatten(0, 2), advantages[rows].flatten(), totals=totals)
    return loss, gradients(actor)


@pytest.mark.parametrize("split", [[[0], [1], [2]], [[2, 0], [1]]], ids=["ones", "mixed"])
def test_micro_batches_add_up(make: Make, split: list[list[int]]) -> None:
    documents = documents_of(LENGTHS)
    loss, wanted = accumulate(make(), documents, [[0, 1, 2]])
    got_loss, got = accumulate(make(), documents, split)
    torch.testing.assert_close(got_loss, loss, rtol=1e-10, atol=0)
    assert max(relative(got[name], wanted[name]) for name in wanted) < 1e-9


def test_leaving_out_a_document_shows(make: Make) -> None:
    """Negative control of the comparison above."""
    documents = documents_of(LENGTHS)
    _, wanted = accumulate(make(), documents, [[0, 1, 2]])
    _, got = accumulate(make(), documents, [[0], [1]])
    assert min(relative(got[name], wanted[name]) for name in wanted) > 1e-3


def perturbed(documents: Documents, row: int) -> Documents:
    tokens = documents.tokens.clone()
    tokens[row] = (tokens[row] + 1) % VOCABULARY
    return Documents(tokens, documents.lengths)


@pytest.mark.parametrize("lengths", [LENGTHS, (40, 40, 40)], ids=["unequal", "equal"])
def test_another_document_changes_not_one_bit(make: Make, lengths: tuple[int, ...]) -> None:
    """Positions by chance alone: the change must not move them, or batches of other shapes would be compared."""
    actor, documents = make(), documents_of(lengths)
    changed = perturbed(documents, 1)
    kept, nsp = [0, 2], replace(NSP, selection="uniform")
    before, after = (values(roll(actor, these, [0, 1, 2], nsp)) for these in (documents, changed))
    for name in before:
        assert torch.equal(before[name][kept], after[name][kept]), name
    assert not torch.equal(before["predicted_hidden"][1], after["predicted_hidden"][1])  # control
    before_scores, after_scores = (actor(mode="score", documents=these) for these in (documents, changed))
    for got, wanted in zip(after_scores, before_scores, strict=True):
        assert torch.equal(got[kept], wanted[kept])
    assert before_scores[0][1] != after_scores[0][1]


def test_another_document_may_move_its_own_positions_only(make: Make) -> None:
    """By entropy a changed document chooses other positions: shapes inside change, and so do last digits."""
    actor, documents = make(), documents_of(LENGTHS)
    before, after = (values(roll(actor, these, [0, 1, 2])) for these in (documents, perturbed(documents, 1)))
    assert not torch.equal(before["positions"][1], after["positions"][1])  # or nothing is tested here
    for name in before:
        assert relative(after[name][[0, 2]].double(), before[name][[0, 2]].double()) < 1e-12, name


def test_another_document_changes_not_one_bit_of_an_update(make: Make) -> None:
    actor, documents = make(), documents_of(LENGTHS)
    branches, *_ = mini_batch(documents)
    before, after = (
        actor(mode="update", documents=these, branches=branches, nsp=NSP)["log_probs"].view(3, -1)
        for these in (documents, perturbed(documents, 1))
    )
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_padding_is_never_read(make: Make) -> None:
    actor, documents = make(), documents_of(LENGTHS)
    tokens = documents.tokens.clone()
    for b, length in enumerate(LENGTHS):
        tokens[b, length:] = VOCABULARY - 1 - tokens[b, length:]
    before = values(roll(actor, documents, [0, 1, 2]))
    after = values(roll(actor, Documents(tokens, LENGTHS), [0, 1, 2]))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_snapshots_do_not_change_rollouts(make: Make) -> None:
    """How often the state is kept is a matter of speed; fewer tokens than snapshots are allowed."""

    actor, documents = make(adapter=InSegments()), documents_of((40, 9, 8))
    results = [
        values(actor(mode="rollout", documents=documents, nsp=NSP, draws=draws_for([0, 1, 2]), snapshots=count))
        for count in (1, 7, 24)
    ]
    for name, wanted in results[0].items():
        for got in results[1:]:
            assert relative(got[name].double(), wanted.double()) < 1e-10, name


def test_pack_keeps_equal_runs_as_rows_and_packs_the_others() -> None:
    runs = [torch.arange(3), torch.arange(3) + 10]
    rows = pack(runs)
    assert rows.cu_seqlens is None and rows.tokens.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert rows.last.tolist() == [2, 5]
    packed = pack([torch.arange(3), torch.arange(1) + 10])
    assert packed.tokens.tolist() == [[0, 1, 2, 10]] and packed.cu_seqlens.tolist() == [0, 3, 4]
    assert packed.last.tolist() == [2, 3]
    with pytest.raises(ValueError, match="empty run"):
        pack([torch.arange(3), torch.arange(0)])


def test_even_cuts_cover_every_document() -> None:
    documents = documents_of((10, 3))
    borders = documents.even_cuts(4)
    assert borders[0] == [0, 0] and borders[-1] == [10, 3]
    steps = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(borders, borders[1:], strict=False)]
    assert {step[0] for step in steps} == {2, 3} and [step[1] for step in steps] == [1, 1, 1, 0]


def test_rows_of_documents() -> None:
    tokens = torch.arange(20).view(4, 5)
    whole = Documents(tokens, (5, 4, 3, 2), (1, 2, 3, 2))
    part = whole.select([2, 0])
    assert part.lengths == (3, 5) and part.learn_from == (3, 1)
    assert torch.equal(part.tokens, tokens[[2, 0]])
    assert [one.lengths for one in whole.split(3)] == [(5, 4, 3), (2,)]
    assert whole.predicted == 4 + 2 + 0 + 0 and Documents(tokens, (5, 4, 3, 2)).predicted == 4 + 3 + 2 + 1
    with pytest.raises(IndexError):
        whole.select([4])
