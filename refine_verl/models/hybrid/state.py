"""Keys and values of the attention layers of a hybrid, held once however many rows continue from them.

A row is a list of stretches of buffers; a buffer holds what one pass over all its tokens made. Forking a row, or going
back to a token in its middle, moves integers only. Which row refers to what is the same in all layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refine_verl.models.state import RowLeaf

Stretch = tuple[int, int, int]
"""(buffer, first, count): tokens of a buffer, in order."""

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer and one buffer, [tokens, H, D] each."""

MOST_BUFFERS = 16
"""With more of them, what rows have behind their first stretch is gathered into one: it is a token a step by then."""


@dataclass(frozen=True, eq=False)
class SharedKeys(RowLeaf):
    """Keys and values of R sequences; no pytree node, so FSDP2 leaves its dtypes alone.

    Attributes:
        stretches: of each row, from its first token to its last.
        layers: the buffers of every attention layer, the same number in each.
    """

    stretches: tuple[tuple[Stretch, ...], ...]
    layers: tuple[tuple[KeyValue, ...], ...]

    @staticmethod
    def empty(rows: int, layers: int) -> SharedKeys:
        """Before the first token."""
        return SharedKeys(((),) * rows, ((),) * layers)

    @property
    def rows(self) -> int:
        return len(self.stretches)

    @property
    def seen(self) -> tuple[int, ...]:
        """Number of tokens that each row has read."""
        return tuple(sum(count for _, _, count in row) for row in self.stretches)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for buffers in self.layers for pair in buffers for tensor in pair]

    @property
    def bytes_per_token(self) -> int:
        return sum(tensor[0].numel() * tensor.element_size() for b in self.layers for pair in b[:1] for tensor in pair)

    def owned(self) -> SharedKeys:
        """One buffer for each row, with its own tokens."""

        def merged(buffers: tuple[KeyValue, ...], row: tuple[Stretch, ...], part: int) -> Tensor:
            return torch.cat([buffers[buffer][part][first : first + count] for buffer, first, count in row])

        rows = [row for row in self.stretches if row]
        layers = tuple(tuple((merged(b, row, 0), merged(b, row, 1)) for row in rows) for b in self.layers)
        places, counts = itertools.count(), self.seen
        return SharedKeys(tuple(((next(places), 0, count),) if count else () for count in counts), layers)

    def rebuild(self, tensors: Sequence[Tensor]) -> SharedKeys:
        rest = iter(tensors)
        return SharedKeys(self.stretches, tuple(tuple((next(rest), next(rest)) for _ in b) for b in self.layers))

    def fresh(self) -> SharedKeys:
        return SharedKeys.empty(self.rows, len(self.layers))

    def select(self, indices: Sequence[int]) -> SharedKeys:
        """Rows by index. Nothing is copied; buffers that no row refers to any more are dropped."""
        stretches = [self.stretches[index] for index in indices]
        used = sorted({buffer for row in stretches for buffer, _, _ in row})
        moved = {buffer: place for place, buffer in enumerate(used)}
        return SharedKeys(_renumbered(stretches, moved), tuple(tuple(b[i] for i in used) for b in self.layers))

    @classmethod
    def stack(cls, leaves: Sequence[SharedKeys]) -> SharedKeys:
        """The rows of all; a buffer that several of them hold is held once."""
        places: dict[tuple[int, ...], tuple[int, int, int]] = {}
        stretches: list[tuple[Stretch, ...]] = []
        for index, leaf in enumerate(leaves):
            moved = {}
            for buffer, pairs in enumerate(zip(*leaf.layers, strict=True)):
                same = tuple(id(tensor) for pair in pairs for tensor in pair)
                moved[buffer] = places.setdefault(same, (len(places), index, buffer))[0]
            stretches += _renumbered(leaf.stretches, moved)
        layers = tuple(
            tuple(leaves[index].layers[layer][buffer] for _, index, buffer in places.values())
            for layer in range(len(leaves[0].layers))
        )
        return cls(tuple(stretches), layers)

    def extended(self, lengths: Sequence[int], made: Sequence[KeyValue]) -> SharedKeys:
        """After ``lengths`` more tokens of each row, whose keys and values are ``made``: a buffer for each layer."""
        number, first = len(self.layers[0]) if self.layers else 0, itertools.accumulate(lengths, initial=0)
        stretches = tuple(
            (*row, (number, start, count)) for row, start, count in zip(self.stretches, first, lengths, strict=False)
        )
        layers = tuple((*buffers, pair) for buffers, pair in zip(self.layers, made, strict=True))
        longer = SharedKeys(stretches, layers)
        return longer.gathered() if number >= MOST_BUFFERS else longer

    def gathered(self) -> SharedKeys:
        """The same rows with what is behind each one's first stretch copied into one buffer, row by row."""
        kept = sorted({row[0][0] for row in self.stretches})
        loose = sorted({buffer for row in self.stretches for buffer, _, _ in row[1:]})
        if not loose:
            return self
        sizes = [self.layers[0][buffer][0].shape[0] for buffer in loose]
        offset = dict(zip(loose, itertools.accumulate(sizes, initial=0), strict=False))
        tokens = [offset[b] + first + i for row in self.stretches for b, first, count in row[1:] for i in range(count)]
        index = torch.tensor(tokens).to(self.layers[0][0][0].device, non_blocking=True)
        moved = {buffer: place for place, buffer in enumerate(kept)}
        stretches, start = [], 0
        for row in self.stretches:
            (buffer, first, count), behind = row[0], sum(count for _, _, count in row[1:])
            own = ((len(kept), start, behind),) if behind else ()
            stretches.append(((moved[buffer], first, count), *own))
            start += behind

        def merged(buffers: tuple[KeyValue, ...], part: int) -> Tensor:
            return torch.cat([buffers[buffer][part] for buffer in loose]).index_select(0, index)

        layers = tuple((*(b[i] for i in kept), (merged(b, 0), merged(b, 1))) for b in self.layers)
        return SharedKeys(tuple(stretches), layers)

    def cut_at(self, sequences: Sequence[int], positions: Sequence[int]) -> SharedKeys:
        """Rows that have read the rows ``sequences`` up to and with the tokens ``positions``, and no further."""
        rows = []
        for sequence, position in zip(sequences, positions, strict=True):
            left, row = position + 1, []
            for buffer, first, count in self.stretches[sequence]:
                if left > 0:
                    row.append((buffer, first, min(count, left)))
                left -= count
            rows.append(tuple(row))
        return SharedKeys(tuple(rows), self.layers)


def _renumbered(stretches: Sequence[tuple[Stretch, ...]], moved: dict[int, int]) -> tuple[tuple[Stretch, ...], ...]:
    return tuple(tuple((moved[buffer], first, count) for buffer, first, count in row) for row in stretches)
