"""Where operators are cut in a pass over documents, and how to get from there to a state: indices, made once a pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., tuple[Tensor, "Tensor | None"]]

ALIGNMENT = 64
"""Pieces of a document begin at multiples of it: the size of a chunk in fla's kernels."""


@dataclass(frozen=True)
class Places:
    """R tokens after which states are wanted.

    Attributes:
        sequences: in which sequence each of them is.
        positions: its index there.
    """

    sequences: tuple[int, ...]
    positions: tuple[int, ...]

    @classmethod
    def of(cls, positions: Tensor) -> Places:
        """For positions int64 ``[N, c]``, sequence by sequence."""
        rows = positions.tolist()
        return cls(tuple(b for b, row in enumerate(rows) for _ in row), tuple(t for row in rows for t in row))


@dataclass(frozen=True)
class Piece:
    """One call of an operator.

    Attributes:
        documents: whose tokens it reads.
        lengths: how many of each.
        carried: rows of the state after the piece before that it continues from; None: all, in order.
    """

    documents: tuple[int, ...]
    lengths: tuple[int, ...]
    carried: tuple[int, ...] | None


class Cuts:
    """Where operators are cut in one pass over documents, worked out once for all layers.

    Args:
        lengths: T of each document; tensors are [N, T, ...] if all are equal, otherwise [1, sum of T, ...].
        starts: of each document the tokens at which pieces begin, ascending, the first 0.
        device: of the tensors.
    """

    def __init__(self, lengths: Sequence[int], starts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.lengths, self.starts, self.device = tuple(lengths), [tuple(row) for row in starts], device
        self.total = sum(lengths)
        self.rows = len(set(lengths)) == 1 and len(set(self.starts)) == 1
        """Whether pieces are stretches of rows, so that nothing has to be packed."""
        stops = [(*row[1:], length) for row, length in zip(self.starts, lengths, strict=True)]
        self.spans = [list(zip(row, ends, strict=True)) for row, ends in zip(self.starts, stops, strict=True)]
        self.first = [sum(lengths[:b]) for b in range(len(lengths))]
        self.pieces = [self._piece(index) for index in range(max(map(len, self.starts)))]
        self._made: dict[Any, Any] = {}

    @classmethod
    def even(cls, lengths: Sequence[int], pieces: int, device: torch.device) -> Cuts:
        """At most ``pieces`` equal stretches of the longest document, the same borders in all of them."""
        size = -(-max(lengths) // max(pieces, 1))
        size += -size % ALIGNMENT
        return cls(lengths, [range(0, length, size) for length in lengths], device)

    def _piece(self, index: int) -> Piece:
        going = tuple(b for b, row in enumerate(self.starts) if len(row) > index)
        before = [b for b, row in enumerate(self.starts) if len(row) >= index]
        carried = tuple(before.index(b) for b in going)
        sizes = tuple(stop - start for start, stop in (self.spans[b][index] for b in going))
        return Piece(going, sizes, None if len(going) == len(before) else carried)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The pieces of a per-token tensor [B, T * s, ...] of s steps a token."""
        steps = self.steps(x)
        if len(self.pieces) == 1:
            return [x]
        if self.rows:
            return x.split([piece.lengths[0] * steps for piece in self.pieces], dim=1)
        order = self.tensor(("order", steps), lambda: with_steps(self._order(), steps))
        sizes = [sum(piece.lengths) * steps for piece in self.pieces]
        return x.flatten(0, 1).index_select(0, order).unsqueeze(0).split(sizes, dim=1)

    def join(self, parts: Sequence[Tensor], batch: int) -> Tensor:
        """The output [B, T * s, ...] from that of every piece."""
        if len(parts) == 1:
            return parts[0]
        joined = torch.cat(list(parts), dim=1)
        if self.rows:
            return joined
        steps = self.steps(joined)
        back = self.tensor(("back", steps), lambda: torch.argsort(with_steps(self._order(), steps)))
        return joined.index_select(1, back).view(batch, -1, *joined.shape[2:])

    def carry(self, state: Tensor, index: int) -> Tensor:
        """The rows of the state after a piece that the next one, ``index``, continues from."""
        carried = self.pieces[index].carried
        if carried is None:
            return state
        return state.index_select(0, self.tensor(("carried", index), lambda: torch.tensor(carried)))

    def last(self, states: Sequence[Tensor]) -> Tensor:
        """The state after the last token of each document, [N, ...], from those after all pieces."""
        if all(piece.carried is None for piece in self.pieces):
            return states[-1]

        def rows() -> Tensor:
            table = [(index, b) for index, piece in enumerate(self.pieces) for b in piece.documents]
            return torch.tensor([table.index((len(row) - 1, b)) for b, row in enumerate(self.starts)])

        return torch.cat(list(states)).index_select(0, self.tensor("last", rows))

    def steps(self, x: Tensor) -> int:
        """How many entries a per-token tensor has for every token."""
        return x.shape[0] * x.shape[1] // self.total

    def borders(self, operator: Operator, index: int, steps: int) -> dict[str, Tensor]:
        """The arguments that tell an operator where the sequences of a piece begin; none where they are rows."""
        if self.rows:
            return {}
        return self.bounds(operator, ("piece", index, steps), self.pieces[index].lengths, steps)

    def bounds(self, operator: Operator, key: Any, lengths: Sequence[int], steps: int) -> dict[str, Tensor]:
        """``cu_seqlens`` of packed sequences, and its copy on the CPU for operators that ask for one."""

        def on_cpu() -> Tensor:
            return torch.tensor([0, *lengths]).cumsum(0) * steps

        bounds = {"cu_seqlens": self.tensor(key, on_cpu)}
        if "cu_seqlens_cpu" in parameters(operator):
            bounds["cu_seqlens_cpu"] = self._once(("cpu", key), on_cpu)
        return bounds

    def lookup(self, places: Places) -> Lookup:
        """How to get the states at ``places``."""
        made: Lookup = self._once(places, lambda: Lookup.of(self, places))
        return made

    def tensor(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` returns, on the device; made once."""
        made: Tensor = self._once((key, "device"), lambda: make().to(self.device, non_blocking=True))
        return made

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _order(self) -> Tensor:
        """Tokens in the order of the pieces."""
        return torch.cat(
            [
                torch.arange(*self.spans[b][index]) + self.first[b]
                for index, piece in enumerate(self.pieces)
                for b in piece.documents
            ]
        )


@dataclass(frozen=True)
class Lookup:
    """How to get states at some places of a pass.

    Attributes:
        places: which.
        pieces: before which of the pieces states are taken up.
        rows: among the states before these pieces, for every place; None: all, in order.
        lengths: tokens to read from there.
        tokens: int64 on the CPU, these tokens, counted through all documents.
    """

    places: Places
    pieces: tuple[int, ...]
    rows: Tensor | None
    lengths: tuple[int, ...]
    tokens: Tensor

    @classmethod
    def of(cls, cuts: Cuts, places: Places) -> Lookup:
        pairs = list(zip(places.sequences, places.positions, strict=True))
        found = [(max(i for i, start in enumerate(cuts.starts[b]) if start <= t), b) for b, t in pairs]
        pieces = tuple(sorted({index for index, _ in found}))
        table = [(index, b) for index in pieces for b in cuts.pieces[index].documents]
        places_in_table = [table.index(pair) for pair in found]
        in_order = places_in_table == list(range(len(table)))
        rows = None if in_order else torch.tensor(places_in_table).to(cuts.device, non_blocking=True)
        starts = [cuts.starts[b][index] for index, b in found]
        runs = [torch.arange(start, t + 1) + cuts.first[b] for start, (b, t) in zip(starts, pairs, strict=True)]
        return cls(places, pieces, rows, tuple(map(len, runs)), torch.cat(runs))


def with_steps(tokens: Tensor, steps: int) -> Tensor:
    """Entries of tokens that have ``steps`` each."""
    return tokens if steps == 1 else (tokens[:, None] * steps + torch.arange(steps, device=tokens.device)).flatten()


@functools.lru_cache(maxsize=64)
def parameters(operator: Operator) -> tuple[str, ...]:
    return tuple(inspect.signature(operator).parameters)
