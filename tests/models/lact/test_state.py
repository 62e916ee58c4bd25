"""Going on from a state: whatever the blocks and whoever shares the batch, the logits are those of one pass."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from reference.toy import documents_of, relative
from torch import Tensor

from refine_verl.models import FastWeightActor, FastWeightState, pack
from refine_verl.models.lact import LaCTState

RELATIVE = 1e-11
LENGTH = 45


def alone(actor: FastWeightActor, tokens: Tensor) -> Tensor:
    """Hidden states [T, d] of one sequence in one pass."""
    return actor.run(pack([tokens]), None, keep_state=False)[0]


def in_blocks(actor: FastWeightActor, rows: list[Tensor], blocks: list[list[int]]) -> tuple[list[Tensor], LaCTState]:
    """Every row in blocks of its own: ``blocks[i][r]`` tokens of row r in pass i."""
    state: FastWeightState | None = None
    done, parts = [0] * len(rows), [[] for _ in rows]
    for sizes in blocks:
        runs = [row[at : at + size] for row, at, size in zip(rows, done, sizes, strict=True)]
        hidden, state = actor.run(pack(runs), state, keep_state=True)
        for part, piece in zip(parts, hidden.split(sizes), strict=True):
            part.append(piece)
        done = [at + size for at, size in zip(done, sizes, strict=True)]
    assert state is not None and done == [len(row) for row in rows]
    return [torch.cat(part) for part in parts], state.tree


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 16, 17, 44])
def test_blocks_of_any_size(make: Callable[..., FastWeightActor], size: int) -> None:
    actor, tokens = make(), documents_of([LENGTH]).tokens[0]
    sizes = [min(size, LENGTH - at) for at in range(0, LENGTH, size)]
    with torch.no_grad():
        (got,), _ = in_blocks(actor, [tokens], [[size] for size in sizes])
        wanted = alone(actor, tokens)
    assert relative(got, wanted) < RELATIVE


@pytest.mark.parametrize("seed", range(6))
def test_rows_at_different_places(make: Callable[..., FastWeightActor], seed: int) -> None:
    """Every pass brings each row another number of tokens."""
    rng = random.Random(seed)
    passes = rng.randint(3, 9)
    blocks = [[rng.choice([1, 1, 2, 4, 9, 20]) for _ in range(4)] for _ in range(passes)]
    lengths = [sum(column) for column in zip(*blocks, strict=True)]
    documents = documents_of(lengths)
    rows = [documents.tokens[b, :length] for b, length in enumerate(lengths)]
    actor = make()
    with torch.no_grad():
        got, state = in_blocks(actor, rows, blocks)
        for mine, row in zip(got, rows, strict=True):
            assert relative(mine, alone(actor, row)) < RELATIVE
    assert state.where.seen == tuple(lengths)


def test_rows_of_different_states(make: Callable[..., FastWeightActor]) -> None:
    """Gathered from several states, forked, and gone on with; one row has not begun."""
    actor = make()
    documents, more = documents_of([30, 19]), documents_of([25], seed=9).tokens[0]
    rows = [documents.tokens[0, :30], documents.tokens[1, :19]]
    with torch.no_grad():
        states = [
            actor.run(pack([row[:n] for row, n in zip(rows, sizes, strict=True)]), None, True)[1]
            for sizes in ((8, 16), (13, 3))
        ]
        one_more, states[1] = actor.run(pack([rows[0][13:14], rows[1][3:4]]), states[1], True)
        picks = [(0, 0), (1, 1), (2, 0), (1, 0), (0, 1), (0, 0)]
        starts = [rows[0][:8], rows[1][:4], rows[0][:0], rows[0][:14], rows[1][:16], rows[0][:8]]
        state = FastWeightState.gather([*states, states[0].select([0]).zeros_like()], picks)
        assert state.rows == 6
        state = state.fork(2)
        for at, stop in ((0, 1), (1, 2), (2, 11), (11, 12), (12, 25)):
            hidden, after = actor.run(pack([more[at:stop]] * 12), state, keep_state=True)
            assert after is not None
            state = after
            for r, mine in enumerate(hidden.split(stop - at)):
                wanted = alone(actor, torch.cat([starts[r // 2], more[:stop]]))[-(stop - at) :]
                assert relative(mine, wanted) < RELATIVE
    assert relative(one_more[0], alone(actor, rows[0])[13]) < RELATIVE


def test_gradients_flow_through_the_blocks(make: Callable[..., FastWeightActor]) -> None:
    actor, tokens = make(), documents_of([LENGTH]).tokens[0]
    weight = torch.randn(LENGTH, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(hidden: Tensor) -> dict[str, Tensor]:
        actor.zero_grad()
        (hidden * weight).sum().backward()
        return {name: p.grad.clone() for name, p in actor.named_parameters() if name != "lm_head.weight"}

    wanted = gradients(alone(actor, tokens))
    assert all(gradient.norm() > 0 for gradient in wanted.values())
    for sizes in ([1] * LENGTH, [3, 5, 1, 16, 9, 11]):
        got = gradients(in_blocks(actor, [tokens], [[size] for size in sizes])[0][0])
        worst = {name: relative(got[name], wanted[name]) for name in wanted}
        assert max(worst.values()) < 1e-9, worst


def test_batches_packed_and_single(make: Callable[..., FastWeightActor]) -> None:
    lengths = (40, 7, 33, 8, 1)
    actor, documents = make(), documents_of(lengths)
    with torch.no_grad():
        hidden, _ = actor.run(documents.cut([0] * 5, lengths), None, keep_state=False)
        for row, length, mine in zip(documents.tokens, lengths, hidden.split(lengths), strict=True):
            assert relative(mine, alone(actor, row[:length])) < RELATIVE


@pytest.mark.parametrize("variant", ["post-norm, muon"], indirect=True)
def test_a_state_does_not_grow(make: Callable[..., FastWeightActor]) -> None:
    """In rows of tokens: at most a window and a chunk with what is put together now and then."""
    actor, tokens = make(), documents_of([160]).tokens
    sizes = []
    with torch.no_grad():
        _, state = actor.run(pack([tokens[0, :40]] * 3), None, keep_state=True)
        for at in range(40, 160):
            _, state = actor.run(pack([tokens[0, at : at + 1]] * 3), state, keep_state=True)
            assert state is not None
            sizes.append(sum({id(t): t.numel() for t in state.tensors}.values()))
    assert max(sizes[60:]) <= max(sizes[:60])


@pytest.mark.parametrize("variant", ["no window"], indirect=True)
def test_another_number_of_rows_is_refused(make: Callable[..., FastWeightActor]) -> None:
    actor, tokens = make(), documents_of([9]).tokens[0]
    _, state = actor.run(pack([tokens, tokens]), None, keep_state=True)
    with pytest.raises(ValueError, match="a state of 2 sequences cannot go on with 1 runs"):
        actor.run(pack([tokens]), state, keep_state=True)
