"""The state of a fast-weight model: everything it needs to go on after a prefix.

A state is a tree (tuples, lists, dicts) of tensors whose first dimension counts sequences. What the
tensors mean is the adapter's business; the algorithm only carries, forks, selects and detaches them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class FastWeightState:
    """Fast weights (and convolution tails, shifted tokens, ...) of ``rows`` sequences.

    Attributes:
        tree: nested tuples, lists and dicts. Each tensor leaf has shape [rows, ...]; ``None`` leaves are kept.
            Recurrent states are float32 (float64 in a float64 model) whatever the activation dtype is.

    All methods return a new state; no tensor is ever modified in place, so states that share tensors are
    independent of each other. Every operation is differentiable.
    """

    tree: Any

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor leaves, in tree order."""
        return [leaf for leaf in pytree.tree_leaves(self.tree) if isinstance(leaf, Tensor)]

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return self.tensors[0].shape[0]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> FastWeightState:
        """Apply ``function`` to every tensor."""
        return FastWeightState(
            pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, self.tree)
        )

    def select(self, indices: Tensor | Sequence[int]) -> FastWeightState:
        """The rows at ``indices`` (int64 [R]), in that order; an index may occur more than once."""
        return self.map(lambda tensor: tensor.index_select(0, torch.as_tensor(indices, device=tensor.device)))

    def fork(self, copies: int) -> FastWeightState:
        """Repeat each row ``copies`` times, copies of one row side by side: [rows * copies, ...]."""
        if copies == 1:
            return self
        return self.map(lambda tensor: tensor.repeat_interleave(copies, dim=0))

    def detach(self) -> FastWeightState:
        """The same values, cut off from the graph.

        The tensors require a gradient: fla's recurrent kernels only have a backward pass if the initial state
        that reaches them does. The gradient ends here and is dropped.
        """
        needs_grad = torch.is_grad_enabled()
        return self.map(lambda tensor: tensor.detach().requires_grad_(needs_grad))

    def zeros_like(self) -> FastWeightState:
        """The state before the first token, in the shape of this one."""
        return self.map(torch.zeros_like)

    @staticmethod
    def stack(states: Sequence[FastWeightState]) -> FastWeightState:
        """Put the rows of several states under each other: [sum of rows, ...]."""
        if len(states) == 1:
            return states[0]
        leaves, spec = zip(*(pytree.tree_flatten(state.tree) for state in states), strict=True)
        joined = [
            torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*leaves, strict=True)
        ]
        return FastWeightState(pytree.tree_unflatten(joined, spec[0]))

    @staticmethod
    def gather(states: Sequence[FastWeightState], picks: Sequence[tuple[int, int]]) -> FastWeightState:
        """Row ``row`` of state ``index`` for each (index, row) in ``picks``: [len(picks), ...].

        Copies only the rows asked for, however many states there are.
        """
        flat = [pytree.tree_flatten(state.tree) for state in states]
        spec = flat[0][1]
        columns = []
        for position, leaf in enumerate(flat[0][0]):
            if isinstance(leaf, Tensor):
                columns.append(torch.cat([flat[index][0][position][row : row + 1] for index, row in picks]))
            else:
                columns.append(leaf)
        return FastWeightState(pytree.tree_unflatten(columns, spec))

    def flatten(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], FastWeightState]]:
        """The tensors and a function that puts tensors in their places into the same tree."""
        leaves, spec = pytree.tree_flatten(self.tree)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def rebuild(tensors: Sequence[Tensor]) -> FastWeightState:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            return FastWeightState(pytree.tree_unflatten(filled, spec))

        return [leaves[i] for i in places], rebuild
