"""What a hybrid's state holds, and how much of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference.toy import documents_of, relative

from refine_verl.models import FastWeightActor, FastWeightState, Packed
from refine_verl.models.hybrid import SharedKeys
from refine_verl.models.hybrid.state import MOST_BUFFERS

pytestmark = pytest.mark.usefixtures("in_float64")
Make = Callable[..., FastWeightActor]
one_family = pytest.mark.parametrize("family", ["olmo_hybrid"], indirect=True)


def read(actor: FastWeightActor, lengths: tuple[int, ...]) -> FastWeightState:
    with torch.no_grad():
        _, state = actor.run(documents_of(lengths).whole, None, keep_state=True)
    assert state is not None
    return state


def storages(keys: SharedKeys) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in keys.tensors}


@one_family
def test_forks_share_keys_and_values(make: Make) -> None:
    """Integers move; states of other positions, forks and stacks of them refer to the tensors of the pass."""
    actor = make()
    with torch.no_grad():
        _, trace = actor.trace(documents_of((40, 33)))
        whole = trace.final.tree["attention"]
        state = trace.after(torch.tensor([[0, 18, 39], [17, 30, 32]]))
        forks = FastWeightState.stack([state.fork(4), state.select([2])])
    keys = forks.tree["attention"]
    assert (state.rows, forks.rows) == (6, 25)
    assert storages(keys) == storages(whole) and len(keys.tensors) == len(whole.tensors) == 2
    assert keys.seen[:8] == (1, 1, 1, 1, 19, 19, 19, 19) and keys.seen[-1] == 40
    gathered = FastWeightState.gather([forks, state], [(1, 5), (0, 4), (1, 0)]).tree["attention"]
    assert gathered.seen == (33, 19, 1) and storages(gathered) == storages(whole)
    assert forks.zeros_like().tree["attention"].seen == (0,) * 25


@one_family
def test_a_state_of_no_row_lets_go(make: Make) -> None:
    one, other = (read(make(), lengths) for lengths in ((20,), (31,)))
    keys = FastWeightState.stack([one, other]).select([1]).tree["attention"]
    assert storages(keys) == storages(other.tree["attention"])


@pytest.mark.parametrize("copies", [1, 3])
def test_token_by_token_is_one_pass(make: Make, copies: int) -> None:
    """Far beyond the number of buffers at which newer keys are brought together."""
    actor, steps = make(), MOST_BUFFERS + 9
    prompts, tails = documents_of((23, 9)), documents_of((steps,) * 2 * copies, seed=8).tokens
    with torch.no_grad():
        state = read(actor, (23, 9)).fork(copies)
        slowly, hidden, sizes = state, [], []
        for step in range(steps):
            last, slowly = actor.run(Packed.of_rows(tails[:, step : step + 1]), slowly, keep_state=True)
            hidden.append(last)
            sizes.append(sum(keys.shape[0] for keys, _ in slowly.tree["attention"].layers[0]))
        at_once, _ = actor.run(Packed.of_rows(tails), state, keep_state=False)
    assert relative(torch.stack(hidden, dim=1).flatten(0, 1), at_once) < 1e-9
    assert sizes == [23 + 9 + 2 * copies * (step + 1) for step in range(steps)]  # the prompts once, and the tails
    assert len(slowly.tree["attention"].layers[0]) <= MOST_BUFFERS + 1
    assert prompts.lengths == (23, 9)


@one_family
def test_other_rows_are_untouched(make: Make) -> None:
    actor, state = make(), read(make(), (20, 20))
    before = [tensor.clone() for tensor in state.tensors]
    with torch.no_grad():
        actor.run(documents_of((5, 5)).whole, state, keep_state=True)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(state.tensors, before, strict=True))
