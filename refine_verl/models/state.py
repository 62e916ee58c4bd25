"""The state of a fast-weight model: everything it needs to continue after a prefix.

A state is a tree (tuples, lists, dicts) of tensors whose first dimension counts sequences. What the
tensors mean is the adapter's business; the algorithm only carries, forks, selects and detaches them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class RowLeaf(ABC):
    """A leaf of the tree that keeps its rows its own way: rows that share values, slices of a common buffer, ...

    Immutable like the state. What is not a tensor (indices, positions) must not be needed by ``rebuild``'s caller.

    One that is a dataclass of tensors, integers, containers and ``parts`` can be saved (`models.keeping`).

    Attributes:
        parts: dataclasses and named tuples that its fields hold.
    """

    parts: ClassVar[tuple[type, ...]] = ()

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of sequences."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All floating-point tensors, in an order of its own; their first dimension need not count rows."""

    @abstractmethod
    def rebuild(self, tensors: Sequence[Tensor]) -> RowLeaf:
        """The same rows over other tensors, given in the order of ``tensors``."""

    @abstractmethod
    def select(self, indices: Sequence[int]) -> RowLeaf:
        """The rows at ``indices``; values that rows have in common should not be copied."""

    @abstractmethod
    def fresh(self) -> RowLeaf:
        """As many rows before their first token."""

    @property
    def bytes_per_token(self) -> int:
        """How much larger a row becomes with every token, for ever; 0 of a memory of fixed size."""
        return 0

    def owned(self) -> RowLeaf:
        """The same rows, without values that none of them refers to and without those of other rows."""
        return self

    @classmethod
    @abstractmethod
    def stack(cls, leaves: Sequence[Any]) -> RowLeaf:
        """The rows of all ``leaves``, stacked."""


@dataclass(frozen=True)
class FastWeightState:
    """Fast weights (and convolution tails, shifted tokens, ...) of ``rows`` sequences.

    Attributes:
        tree: nested tuples, lists and dicts. Each tensor leaf has shape [rows, ...]; ``None`` leaves are kept. A leaf
            may also be a :class:`RowLeaf`.
            Recurrent states are float32 (float64 in a float64 model) whatever the activation dtype is.

    All methods return a new state; no tensor is ever modified in place, so states that share tensors are
    independent of each other. Every operation is differentiable.
    """

    tree: Any

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor leaves, in tree order."""
        return self.flatten()[0]

    @property
    def rows(self) -> int:
        """Number of sequences."""
        leaf = next(leaf for leaf in pytree.tree_leaves(self.tree) if isinstance(leaf, Tensor | RowLeaf))
        return leaf.rows if isinstance(leaf, RowLeaf) else leaf.shape[0]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> FastWeightState:
        """Apply ``function`` to every tensor."""
        return self._each(function, lambda leaf: leaf.rebuild([function(tensor) for tensor in leaf.tensors]))

    def to(self, device: torch.device) -> FastWeightState:
        """On ``device``; itself where it is there already."""
        if all(tensor.device == device for tensor in self.tensors):
            return self
        return self.map(lambda tensor: tensor.to(device))

    def select(self, indices: Tensor | Sequence[int]) -> FastWeightState:
        """The rows at ``indices`` (int64 [R]), in that order; an index may occur more than once."""
        rows = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        return self._each(
            lambda tensor: tensor.index_select(0, torch.as_tensor(indices, device=tensor.device)),
            lambda leaf: leaf.select(rows),
        )

    def split(self, sizes: Sequence[int]) -> list[FastWeightState]:
        """The first ``sizes[0]`` rows, the next ``sizes[1]`` and so on; nothing is copied that rows have in common.

        Gradients of the parts are put together once, whatever their number.
        """
        borders = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        leaves, spec = pytree.tree_flatten(self.tree)
        columns = [
            leaf.split(list(sizes))
            if isinstance(leaf, Tensor)
            else [leaf.select(range(*pair)) for pair in zip(borders, borders[1:], strict=False)]
            if isinstance(leaf, RowLeaf)
            else [leaf] * len(sizes)
            for leaf in leaves
        ]
        return [FastWeightState(pytree.tree_unflatten([part[i] for part in columns], spec)) for i in range(len(sizes))]

    def fork(self, copies: int) -> FastWeightState:
        """Repeat each row ``copies`` times, copies of one row side by side: [rows * copies, ...]."""
        if copies == 1:
            return self
        return self._each(
            lambda tensor: tensor.repeat_interleave(copies, dim=0),
            lambda leaf: leaf.select([row for row in range(leaf.rows) for _ in range(copies)]),
        )

    def _each(self, of_tensor: Callable[[Tensor], Tensor], of_leaf: Callable[[RowLeaf], RowLeaf]) -> FastWeightState:
        of_type = pytree.tree_map_only
        return FastWeightState(of_type(Tensor, of_tensor, of_type(RowLeaf, of_leaf, self.tree)))

    def detach(self) -> FastWeightState:
        """The same values, cut off from the graph.

        The tensors require a gradient: fla's recurrent kernels only have a backward pass if the initial state
        that reaches them does. The gradient ends here and is dropped.
        """
        needs_grad = torch.is_grad_enabled()
        return self.map(lambda tensor: tensor.detach().requires_grad_(needs_grad and tensor.is_floating_point()))

    def owned(self) -> FastWeightState:
        """The same values and nothing else: no view of a tensor, and no buffer, that holds more than these rows."""

        def own(tensor: Tensor) -> Tensor:
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)

        return self._each(lambda tensor: tensor, lambda leaf: leaf.owned()).map(own)

    @property
    def bytes_per_token(self) -> int:
        """How much larger a row becomes with every token; 0 of a memory of fixed size."""
        return sum(leaf.bytes_per_token for leaf in pytree.tree_leaves(self.tree) if isinstance(leaf, RowLeaf))

    def zeros_like(self) -> FastWeightState:
        """The state before the first token, in the shape of this one."""
        return self._each(torch.zeros_like, lambda leaf: leaf.fresh())

    def unread_leaves(self) -> FastWeightState:
        """The same tensors, and leaves of other kinds as before the first token."""
        return self._each(lambda tensor: tensor, lambda leaf: leaf.fresh())

    @staticmethod
    def stack(states: Sequence[FastWeightState]) -> FastWeightState:
        """Stack the rows of several states: [sum of rows, ...]."""
        if len(states) == 1:
            return states[0]
        return FastWeightState(pytree.tree_map(_join, *(state.tree for state in states)))

    @staticmethod
    def gather(states: Sequence[FastWeightState], picks: Sequence[tuple[int, int]]) -> FastWeightState:
        """Row ``row`` of state ``index`` for each (index, row) in ``picks``: [len(picks), ...].

        Copies only the rows asked for, however many states there are.
        """
        return FastWeightState(pytree.tree_map(lambda *leaves: _gather(leaves, picks), *(s.tree for s in states)))

    def flatten(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], FastWeightState]]:
        """The tensors and a function that puts tensors in their places into the same tree."""
        leaves, spec = pytree.tree_flatten(self.tree)
        parts = [
            leaf.tensors if isinstance(leaf, RowLeaf) else [leaf] if isinstance(leaf, Tensor) else [] for leaf in leaves
        ]
        total = sum(map(len, parts))

        def rebuild(tensors: Sequence[Tensor]) -> FastWeightState:
            if len(tensors) != total:
                raise ValueError(f"this state has {total} tensors, {len(tensors)} were given")
            rest = iter(tensors)
            filled: list[Any] = []
            for leaf, part in zip(leaves, parts, strict=True):
                own = [next(rest) for _ in part]
                filled.append(leaf.rebuild(own) if isinstance(leaf, RowLeaf) else own[0] if own else leaf)
            return FastWeightState(pytree.tree_unflatten(filled, spec))

        return [tensor for part in parts for tensor in part], rebuild


def _join(*leaves: Any) -> Any:
    """One leaf of several states, rows stacked."""
    first = leaves[0]
    if isinstance(first, RowLeaf):
        return type(first).stack(leaves)
    return torch.cat(leaves) if isinstance(first, Tensor) else first


def _gather(leaves: Sequence[Any], picks: Sequence[tuple[int, int]]) -> Any:
    """Row ``row`` of leaf ``index`` for each (index, row); a `RowLeaf` selects, stacks and puts them in order."""
    if isinstance(leaves[0], Tensor):
        return torch.cat([leaves[index][row : row + 1] for index, row in picks])
    if not isinstance(leaves[0], RowLeaf):
        return leaves[0]
    used = sorted({index for index, _ in picks})
    order = sorted(range(len(picks)), key=lambda place: picks[place][0])
    parts = [leaves[index].select([row for other, row in picks if other == index]) for index in used]
    stacked = parts[0] if len(parts) == 1 else type(parts[0]).stack(parts)
    return stacked.select(sorted(range(len(order)), key=order.__getitem__))
