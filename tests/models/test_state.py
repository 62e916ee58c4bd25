"""Operations on states: values, independence, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refine_verl.models import FastWeightState


def a_state(rows: int = 3, start: float = 0.0, grad: bool = False) -> FastWeightState:
    """Two layers as fla nests them, with a leaf that is None and one that is no tensor."""
    recurrent = (start + torch.arange(rows * 4.0).view(rows, 2, 2)).requires_grad_(grad)
    conv = (start + 100 + torch.arange(rows * 2.0).view(rows, 2)).requires_grad_(grad)
    return FastWeightState(({"recurrent": recurrent, "conv": (conv, None), "seen": 7}, {"recurrent": -recurrent}))


def rows_of(state: FastWeightState) -> list[list[list[float]]]:
    """Every row of every tensor, as plain numbers: [tensor][row]."""
    return [tensor.detach().flatten(1).tolist() for tensor in state.tensors]


def test_shape_of_a_state() -> None:
    state = a_state()
    assert state.rows == 3 and len(state.tensors) == 3
    assert state.num_bytes == (12 + 6 + 12) * 4


@pytest.mark.parametrize("indices", [[2, 0], [1, 1, 1], torch.tensor([0])])
def test_select(indices: list[int] | Tensor) -> None:
    state = a_state()
    selected = state.select(indices)
    for got, wanted in zip(rows_of(selected), rows_of(state), strict=True):
        assert got == [wanted[int(index)] for index in indices]
    assert selected.tree[0]["conv"][1] is None and selected.tree[0]["seen"] == 7


def test_fork_puts_copies_side_by_side() -> None:
    state = a_state()
    assert rows_of(state.fork(2)) == rows_of(state.select([0, 0, 1, 1, 2, 2]))
    assert rows_of(state.fork(1)) == rows_of(state)


def test_stack_and_gather() -> None:
    first, second = a_state(3), a_state(2, start=50)
    stacked = FastWeightState.stack([first, second])
    assert rows_of(stacked) == [a + b for a, b in zip(rows_of(first), rows_of(second), strict=True)]
    picks = [(1, 0), (0, 2), (1, 1), (1, 0)]
    assert rows_of(FastWeightState.gather([first, second], picks)) == rows_of(stacked.select([3, 2, 4, 3]))
    assert FastWeightState.stack([first]) is first


def test_zeros_like_and_map() -> None:
    state = a_state()
    assert all((tensor == 0).all() for tensor in state.zeros_like().tensors)
    assert [t.shape for t in state.zeros_like().tensors] == [t.shape for t in state.tensors]
    assert rows_of(state.map(lambda tensor: tensor * 2))[0][1] == [8.0, 10.0, 12.0, 14.0]


def test_flatten_and_back() -> None:
    state = a_state()
    tensors, rebuild = state.flatten()
    assert [id(t) for t in tensors] == [id(t) for t in state.tensors]
    doubled = rebuild([tensor * 2 for tensor in tensors])
    assert rows_of(doubled) == rows_of(state.map(lambda tensor: tensor * 2))
    assert doubled.tree[0]["conv"][1] is None and doubled.tree[0]["seen"] == 7
    with pytest.raises(ValueError):
        rebuild(tensors[:-1])


OPERATIONS = {
    "select": lambda state: state.select([2, 0]),
    "fork": lambda state: state.fork(3),
    "stack": lambda state: FastWeightState.stack([state, state]),
    "gather": lambda state: FastWeightState.gather([state, state], [(0, 1), (1, 2)]),
    "zeros_like": lambda state: state.zeros_like(),
    "map": lambda state: state.map(lambda tensor: tensor + 1),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_results_are_independent_of_their_source(operation: str) -> None:
    state = a_state()
    before = rows_of(state)
    result = OPERATIONS[operation](state)
    assert rows_of(state) == before
    for tensor in result.tensors:
        tensor.fill_(-1)
    assert rows_of(state) == before


@pytest.mark.parametrize(
    ("operation", "uses"),
    [("select", [1, 0, 1]), ("fork", [3, 3, 3]), ("stack", [2, 2, 2]), ("gather", [0, 1, 1])],
)
def test_gradients_count_how_often_a_row_is_used(operation: str, uses: list[int]) -> None:
    state = a_state(grad=True)
    recurrent = state.tree[0]["recurrent"]
    OPERATIONS[operation](state).tree[0]["recurrent"].sum().backward()
    assert recurrent.grad.flatten(1).tolist() == [[float(count)] * 4 for count in uses]


def test_detach_ends_the_gradient_but_asks_for_one() -> None:
    """fla's recurrent kernels have a backward pass only if their initial state wants a gradient."""
    state = a_state(grad=True)
    detached = state.detach()
    assert rows_of(detached) == rows_of(state)
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in detached.tensors)
    sum(tensor.sum() for tensor in detached.tensors).backward()
    assert state.tree[0]["recurrent"].grad is None
    with torch.no_grad():
        assert not any(tensor.requires_grad for tensor in state.detach().tensors)


def test_counters_in_a_state_are_detached_as_they_are() -> None:
    state = FastWeightState({"weights": torch.ones(2, 3, requires_grad=True), "position": torch.tensor([4, 7])})
    detached = state.detach()
    assert [tensor.requires_grad for tensor in detached.tensors] == [
        tensor.is_floating_point() for tensor in detached.tensors
    ]
