"""States that are kept: documents read from state to state, in memory that does not depend on their length.

And a state as tensors and a description in JSON, from which it is put together again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from refine_verl.models.packing import Packed, pack
from refine_verl.models.passes import Passes
from refine_verl.models.state import FastWeightState, RowLeaf


def read_on(
    actor: Passes,
    rows: Sequence[Tensor],
    states: Sequence[FastWeightState] | None,
    segment: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[FastWeightState]:
    """Read rows of unequal length, a segment at a time, without gradients; a row that has ended is read no further.

    Args:
        actor: the model.
        rows: int64 [T_b], on any device; at least one token each.
        states: of one row each, after what was read before; None: these are the beginnings.
        segment: tokens of a row in one pass, at least 1.
        progress: told after each pass how many tokens it read.

    Returns:
        For each row the state after it, which holds nothing else (`FastWeightState.owned`).
    """
    device = next(actor.parameters()).device
    state = None if states is None else FastWeightState.stack(states)
    left, found, start = list(range(len(rows))), {}, 0
    while left:
        packed = pack([rows[row][start : start + segment].to(device, non_blocking=True) for row in left])
        _, state = actor.run(packed, state, keep_state=True)
        assert state is not None
        progress(sum(packed.lengths))
        start += segment
        places = [place for place, row in enumerate(left) if len(rows[row]) > start]
        if len(places) == len(left):
            continue
        found.update({row: state.select([p]).owned() for p, row in enumerate(left) if len(rows[row]) <= start})
        left, state = [left[place] for place in places], state.select(places) if places else None
    return [found[row] for row in range(len(rows))]


def bytes_per_token(actor: Passes) -> int:
    """How much larger the state of one row becomes with every token; found out with a pass over one token.

    0 without a pass where the adapter does not say that its states grow (``grows``).
    """
    return first_state(actor).bytes_per_token if getattr(actor.adapter, "grows", False) else 0


def first_state(actor: Passes) -> FastWeightState:
    """The state of one row after one token, whichever it is: what the model's states look like."""
    device = next(actor.parameters()).device
    _, state = actor.run(Packed.of_rows(torch.zeros(1, 1, dtype=torch.int64, device=device)), None, keep_state=True)
    assert state is not None
    return state


def look_alike(one: FastWeightState, other: FastWeightState) -> bool:
    """Whether two states of one row each can be of one model: trees, shapes and dtypes are the same.

    Leaves that keep rows their own way are compared as they are before the first token, where they do not depend on
    what was read. States that cannot be described (`describe`) are taken to look alike.
    """
    try:
        (tree, tensors), (other_tree, others) = (describe(state.unread_leaves()) for state in (one, other))
    except TypeError:
        return True
    kinds, other_kinds = ([(tensor.shape, tensor.dtype) for tensor in part] for part in (tensors, others))
    return bool(tree == other_tree and kinds == other_kinds)


def describe(state: FastWeightState) -> tuple[Any, list[Tensor]]:
    """A state as something JSON can hold, and the tensors that it counts through.

    Raises:
        TypeError: it holds something else than tensors, numbers, texts, containers and known classes of them.
    """
    tensors: list[Tensor] = []
    return _describe(state.tree, _classes(), tensors), tensors


def _describe(value: Any, classes: dict[str, type], tensors: list[Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"dict": {name: _describe(part, classes, tensors) for name, part in value.items()}}
    name = _name(type(value))
    if name in classes:
        parts = {field: _describe(getattr(value, field), classes, tensors) for field in _fields(type(value))}
        return {"class": name, "fields": parts}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_describe(part, classes, tensors) for part in value]}
    raise TypeError(f"a state that holds a {name} cannot be saved")


def restore(description: Any, tensors: Sequence[Tensor]) -> FastWeightState:
    """The state that `describe` described. No name in the description leads to an import.

    Raises:
        KeyError, IndexError, TypeError, ValueError: it describes no state of these tensors.
    """
    return FastWeightState(_restore(description, _classes(), tensors))


def _restore(item: Any, classes: dict[str, type], tensors: Sequence[Tensor]) -> Any:
    if not isinstance(item, dict):
        return item
    if "class" in item:
        parts = {field: _restore(part, classes, tensors) for field, part in item["fields"].items()}
        return classes[item["class"]](**parts)
    ((kind, content),) = item.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: _restore(part, classes, tensors) for name, part in content.items()}
    return {"list": list, "tuple": tuple}[kind](_restore(part, classes, tensors) for part in content)


def _classes() -> dict[str, type]:
    """Classes of leaves and of their parts, by name: those that exist by now."""
    leaves: list[Any] = [RowLeaf]
    for leaf in leaves:
        leaves += [kind for kind in leaf.__subclasses__() if kind not in leaves]
    return {_name(kind): kind for leaf in leaves[1:] for kind in (leaf, *leaf.parts) if _fields(kind)}


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _fields(kind: Any) -> tuple[str, ...]:
    """Of a dataclass or a named tuple."""
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else getattr(kind, "_fields", ())
