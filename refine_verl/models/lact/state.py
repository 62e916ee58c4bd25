"""What a LaCT needs to continue after a prefix, and how rows share it.

Three things with three life times: fast weights change every C tokens, so rows within a chunk refer to the same
values; the tokens of the open chunk are only read when it is full, so they are kept as references to slices of what
the passes computed; keys and values of the window are read at every token, so they lie ready, with a short tail
behind them for the newest ones. Which row refers to what is the same in all layers and is kept once, as integers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from refine_verl.models.lact.fast_weights import ChunkTokens, FastWeights
from refine_verl.models.state import RowLeaf

NOWHERE = -1
"""Buffer index of a row that has no values yet."""


@dataclass(frozen=True)
class Rows:
    """Where each of R rows finds its values.

    Attributes:
        seen: number of tokens read.
        fast: (buffer, set) of the fast weights in force; those after all chunks that were full before the last token.
        window: (buffer, row, start): slot s there holds position start + s, up to ``border``.
        border: position of the first token in the tail.
        open: tokens since the last update, in order: (buffer, first, count).
    """

    seen: tuple[int, ...]
    fast: tuple[tuple[int, int], ...]
    window: tuple[tuple[int, int, int], ...]
    border: tuple[int, ...]
    open: tuple[tuple[tuple[int, int, int], ...], ...]

    @staticmethod
    def fresh(rows: int) -> Rows:
        """Before the first token."""
        return Rows((0,) * rows, ((NOWHERE, 0),) * rows, ((NOWHERE, 0, 0),) * rows, (0,) * rows, ((),) * rows)

    def select(self, indices: Sequence[int]) -> Rows:
        return Rows(*(tuple(part[i] for i in indices) for part in vars(self).values()))

    def renumber(self, fast: dict[int, int], window: dict[int, int], open_: dict[int, int]) -> Rows:
        """The same references after buffers have moved."""
        return replace(
            self,
            fast=tuple((fast.get(b, NOWHERE), u) for b, u in self.fast),
            window=tuple((window.get(b, NOWHERE), r, s) for b, r, s in self.window),
            open=tuple(tuple((open_[b], first, n) for b, first, n in pieces) for pieces in self.open),
        )


@dataclass(frozen=True)
class LayerState:
    """The buffers of one layer.

    Attributes:
        fast: lots of fast weights.
        window: rotated keys and values [U, H, P, D] of attention heads.
        tail: the same of the newest tokens, [R, n, H, D], from each row's border on; None if there are none.
        open: tokens [tokens, h, d] of chunks that are not full.
    """

    fast: tuple[FastWeights, ...] = ()
    window: tuple[tuple[Tensor, Tensor], ...] = ()
    tail: tuple[Tensor, Tensor] | None = None
    open: tuple[ChunkTokens, ...] = ()


@dataclass(frozen=True, eq=False)
class LaCTState(RowLeaf):
    """State of R sequences after any number of tokens each; not a pytree node, so FSDP leaves its dtypes alone."""

    where: Rows
    layers: tuple[LayerState, ...]
    parts: ClassVar = (Rows, LayerState, FastWeights, ChunkTokens)

    @staticmethod
    def empty(rows: int, layers: int) -> LaCTState:
        """Before the first token."""
        return LaCTState(Rows.fresh(rows), (LayerState(),) * layers)

    @property
    def rows(self) -> int:
        return len(self.where.seen)

    def _parts(self) -> list[tuple[Any, ...]]:
        return [tuple(vars(layer).values()) for layer in self.layers]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(self._parts()) if isinstance(leaf, Tensor)]

    def rebuild(self, tensors: Sequence[Tensor]) -> LaCTState:
        rest = iter(tensors)
        filled = pytree.tree_map_only(Tensor, lambda _: next(rest), self._parts())
        return LaCTState(self.where, tuple(LayerState(*parts) for parts in filled))

    def fresh(self) -> LaCTState:
        return LaCTState.empty(self.rows, len(self.layers))

    def select(self, indices: Sequence[int]) -> LaCTState:
        """Rows by index. Only tails are copied; buffers nobody refers to any more are dropped."""
        indices = list(indices)
        if indices == list(range(self.rows)):
            return self
        layers, tail = self.layers, self.layers[0].tail
        if tail is not None:
            index = torch.tensor(indices).to(tail[0].device, non_blocking=True)
            tails = [pytree.tree_map_only(Tensor, lambda x: x.index_select(0, index), layer.tail) for layer in layers]
            layers = tuple(replace(layer, tail=taken) for layer, taken in zip(layers, tails, strict=True))
        return LaCTState(self.where.select(indices), layers).compact()

    def compact(self) -> LaCTState:
        """The same without the buffers that no row refers to."""
        fast, window, open_ = used = referenced(self.where)
        layers = tuple(
            replace(
                layer,
                fast=tuple(layer.fast[b] for b in fast),
                window=tuple(layer.window[b] for b in window),
                open=tuple(layer.open[b] for b in open_),
            )
            for layer in self.layers
        )
        return LaCTState(self.where.renumber(*({b: i for i, b in enumerate(kept)} for kept in used)), layers)

    def owned(self) -> LaCTState:
        """Of every buffer what the rows refer to, copied; rows of one set of fast weights still share it."""
        where = self.where
        open_ = [pieces for pieces in where.open if pieces]
        sets = {pair: i for i, pair in enumerate(dict.fromkeys(p for p in where.fast if p[0] != NOWHERE))}
        windows = {pair: i for i, pair in enumerate(dict.fromkeys(w[:2] for w in where.window if w[0] != NOWHERE))}
        layers = tuple(
            LayerState(
                tuple(_row(layer.fast[b], slice(u, u + 1)) for b, u in sets),
                tuple(_row(layer.window[b], slice(row, row + 1)) for b, row in windows),
                layer.tail,
                tuple(_joined([_row(layer.open[b], slice(i, i + n)) for b, i, n in pieces]) for pieces in open_),
            )
            for layer in self.layers
        )
        number = itertools.count()
        rows = replace(
            where,
            fast=tuple((sets[pair], 0) if pair in sets else (NOWHERE, 0) for pair in where.fast),
            window=tuple((windows[b, r], 0, s) if (b, r) in windows else (NOWHERE, 0, 0) for b, r, s in where.window),
            open=tuple(((next(number), 0, sum(n for *_, n in p)),) if p else () for p in where.open),
        )
        return LaCTState(rows, layers)

    @classmethod
    def stack(cls, leaves: Sequence[LaCTState]) -> LaCTState:
        """The rows of all; a buffer that several of them hold is held once."""
        used: list[tuple[dict[int, int], dict[int, int], dict[int, int]]] = [({}, {}, {}) for _ in leaves]
        picks: list[list[tuple[int, int]]] = []
        for kind, name in enumerate(("fast", "window", "open")):
            places: dict[tuple[int, ...], tuple[int, int, int]] = {}
            for index, leaf in enumerate(leaves):
                for b, buffer in enumerate(getattr(leaf.layers[0], name)):
                    same = tuple(map(id, pytree.tree_leaves(buffer)))
                    used[index][kind][b] = places.setdefault(same, (len(places), index, b))[0]
            picks.append([(index, b) for _, index, b in places.values()])
        parts = [leaf.where.renumber(*maps) for leaf, maps in zip(leaves, used, strict=True)]
        where = Rows(*(sum(column, ()) for column in zip(*(vars(part).values() for part in parts), strict=True)))
        layers = tuple(
            LayerState(
                tuple(leaves[i].layers[n].fast[b] for i, b in picks[0]),
                tuple(leaves[i].layers[n].window[b] for i, b in picks[1]),
                _stack_tails([leaf.layers[n].tail for leaf in leaves], [leaf.rows for leaf in leaves]),
                tuple(leaves[i].layers[n].open[b] for i, b in picks[2]),
            )
            for n in range(len(leaves[0].layers))
        )
        return LaCTState(where, layers)


def _row(buffer: Any, rows: slice) -> Any:
    """Some of the first dimension of all its tensors, copied."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[rows].clone(), buffer)


def _joined(parts: Sequence[ChunkTokens]) -> ChunkTokens:
    return pytree.tree_map(lambda *x: torch.cat(x) if isinstance(x[0], Tensor) else x[0], *parts)


def referenced(where: Rows) -> tuple[list[int], list[int], list[int]]:
    """Buffers that rows refer to: fast weights, windows, open chunks."""
    return (
        sorted({b for b, _ in where.fast} - {NOWHERE}),
        sorted({b for b, _, _ in where.window} - {NOWHERE}),
        sorted({b for pieces in where.open for b, _, _ in pieces}),
    )


def _stack_tails(tails: Sequence[tuple[Tensor, Tensor] | None], rows: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Tails of unequal length: shorter ones filled up behind, where no row looks."""
    there = [tail for tail in tails if tail is not None]
    if not there:
        return None
    longest = max(tail[0].shape[1] for tail in there)

    def padded(part: int) -> Tensor:
        made = []
        for tail, count in zip(tails, rows, strict=True):
            if tail is None:
                made.append(there[0][part].new_zeros(count, longest, *there[0][part].shape[2:]))
            else:
                made.append(F.pad(tail[part], (0, 0, 0, 0, 0, longest - tail[part].shape[1])))
        return torch.cat(made)

    return padded(0), padded(1)


class LaCTCache(Cache):
    """``past_key_values`` of :class:`LaCTForCausalLM`: its size does not depend on the length of the text.

    Attributes:
        state: of the batch, None before the first token.
        seen_tokens: length of the batch so far, padding included.
    """

    def __init__(self, state: LaCTState | None = None, seen_tokens: int = 0) -> None:
        super().__init__(layers=[])
        self.state = state
        self.seen_tokens = seen_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length of the batch so far, padding included."""
        return self.seen_tokens

    @property
    def num_bytes(self) -> int:
        """Size of the state; tensors that several layers or rows share are counted once."""
        if self.state is None:
            return 0
        return sum({id(t): t.numel() * t.element_size() for t in self.state.tensors}.values())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at ``indices``."""
        self._select(indices.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Fork every row."""
        if self.state is not None:
            self._select([row for row in range(self.state.rows) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        self.state = None if self.state is None else self.state.select(rows)

    def crop(self, max_length: int) -> None:
        """Raises: NotImplementedError, fast weights cannot be taken back."""
        raise NotImplementedError("the fast weights of a LaCT cannot forget tokens: keep a copy of the cache instead")

    def reset(self) -> None:
        """Back to before the first token."""
        self.state, self.seen_tokens = None, 0
