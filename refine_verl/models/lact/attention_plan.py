"""Which keys each query of a pass attends to: index arithmetic on lengths and positions, done once for all layers.

Shapes: H attention heads of D features, R rows, L new tokens of a row, P slots of a window buffer, n of a tail.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from refine_verl.models.lact.state import NOWHERE, LayerState, Rows, referenced
from refine_verl.models.lact.take import Take

_SHORT_RUN = 16
_LONGEST_TAIL = 64


@dataclass(frozen=True)
class Group:
    """Rows that look at the same window buffer, G of them (or none) at each of its ``values``.

    Attributes:
        buffer: its index, NOWHERE for rows without a window.
        values: which rows of the buffer; None for all.
        rows: R -> U * G.
        grid: (U, G).
        base: bool [U, 1, G, L, P], which slots a query sees; None without a buffer.
        near: bool [U, 1, G, L, n], the same for the tail with the new tokens.
    """

    buffer: int
    values: Tensor | None
    rows: Take
    grid: tuple[int, int]
    base: Tensor | None
    near: Tensor


@dataclass(frozen=True)
class ShortPlan:
    """Attend to the state in place.

    Attributes:
        queries: tokens -> R * L.
        near: tail and new tokens -> R * n, each row from its border on.
        shape: (R, L, n).
        groups: by window buffer.
        back: R * L, group by group -> tokens.
    """

    queries: Take
    near: Take
    shape: tuple[int, int, int]
    groups: tuple[Group, ...]
    back: Take


@dataclass(frozen=True)
class LongPlan:
    """Attend block by block to a copy of what is needed.

    Attributes:
        buffers: window buffers to read from, with the tail behind them and the new tokens behind that.
        queries: tokens -> those of starts, blocks and masked blocks.
        starts: (rows, tokens) of sequences that begin here, up to a window; ``start_keys`` leads to their keys.
        blocks: keys -> blocks; ``plain`` and ``masked`` name the three blocks each block of queries attends to.
        size: of a block.
        band: bool [size, 3 * size].
        holes: bool [masked, 1, size, 3 * size]: the band without what lies before a sequence.
        window: keys -> R * slots, the window after the pass; None if no state is kept.
        slots: P of it.
        packed: for flash-attn: keys, cumulative lengths of queries and keys, longest of each.
    """

    buffers: tuple[int, ...]
    queries: Take
    starts: tuple[int, int]
    start_keys: Take
    blocks: Take
    plain: Tensor
    masked: Tensor
    size: int
    band: Tensor
    holes: Tensor
    window: Take | None
    slots: int
    packed: tuple[Take, Tensor, Tensor, int, int] | None


Plan = ShortPlan | LongPlan
_Items = list[tuple[int, Tensor, int]]
"""Blocks: number, queries, slots of its keys that lie before the sequence."""


def plan_attention(
    where: Rows, lengths: Sequence[int], state: LayerState, window: int | None, keep: bool, device: torch.device
) -> tuple[Plan | None, Rows]:
    """Args:
    where: references of the rows before the pass.
    lengths: tokens of each row.
    state: of any layer, for the shapes of its buffers.
    window: W, None for no limit.
    keep: whether the state after the pass is wanted.
    device: of the tensors.

    Returns:
        The plan (None for W = 1, where attention returns the values) and ``where`` with the references into windows
        after the pass.
    """
    if window == 1:
        return None, where
    after = [seen + length for seen, length in zip(where.seen, lengths, strict=True)]
    near = max(end - border for end, border in zip(after, where.border, strict=True))
    reach = window or 2 * (max(after) + 1)
    few = max(lengths) <= max(1, min(_SHORT_RUN, reach // 4)) and any(where.seen)
    if few and (not keep or near <= max(1, min(_LONGEST_TAIL, reach // 4))):
        return _plan_short(where, lengths, state, reach, near, device), where
    return _plan_long(where, lengths, state, reach, keep, device)


def _plan_short(
    where: Rows, lengths: Sequence[int], state: LayerState, reach: int, near: int, device: torch.device
) -> ShortPlan:
    rows, longest = len(lengths), max(lengths)
    count = torch.tensor(lengths)
    start = count.cumsum(0) - count
    steps = torch.arange(longest)
    queries = (start[:, None] + steps).masked_fill(steps >= count[:, None], -1)
    seen, border = torch.tensor(where.seen), torch.tensor(where.border)
    tail = 0 if state.tail is None else state.tail[0].shape[1]
    slots = torch.arange(near)
    old, end = (seen - border)[:, None], (seen - border + count)[:, None]
    index = torch.where(
        slots < old, torch.arange(rows)[:, None] * tail + slots, rows * tail + start[:, None] + slots - old
    )
    index = index.masked_fill(slots >= end, -1)
    position = seen[:, None] + steps  # [R, L]
    at = border[:, None, None] + slots
    sees_near = (at <= position[..., None]) & (at > position[..., None] - reach)  # [R, L, n]
    groups, order = [], []
    for buffer in sorted({b for b, _, _ in where.window}):
        mine = [r for r in range(rows) if where.window[r][0] == buffer and lengths[r]]
        if mine:
            keys = None if buffer == NOWHERE else state.window[buffer][0]
            group, grid = _group(where, mine, buffer, keys, position, sees_near, reach, device)
            groups.append(group)
            order.append(grid)
    flat = torch.cat(order)  # row of each place, -1 for none
    places = torch.full((rows,), -1)
    places[flat[flat >= 0]] = torch.arange(len(flat))[flat >= 0]
    back = (places[:, None] * longest + steps)[steps < count[:, None]]
    return ShortPlan(
        Take.of(queries.flatten(), int(count.sum()), device),
        Take.of(index.flatten(), rows * tail + int(count.sum()), device),
        (rows, longest, near),
        tuple(groups),
        Take.of(back, len(flat) * longest, device),
    )


def _group(
    where: Rows,
    mine: list[int],
    buffer: int,
    keys: Tensor | None,
    position: Tensor,
    sees_near: Tensor,
    reach: int,
    device: torch.device,
) -> tuple[Group, Tensor]:
    by_value: dict[int, list[int]] = {}
    for r in mine:
        by_value.setdefault(where.window[r][1], []).append(r)
    values = sorted(by_value)
    grid = pad_sequence([torch.tensor(by_value[u]) for u in values], batch_first=True, padding_value=-1)
    base = None
    if keys is not None:
        start = torch.tensor([s for _, _, s in where.window])
        at = start[:, None, None] + torch.arange(keys.shape[2])
        sees = (at < torch.tensor(where.border)[:, None, None]) & (at > position[..., None] - reach)
        base = sees[grid].unsqueeze(1).to(device, non_blocking=True)
    every = values == list(range(1 if keys is None else len(keys)))
    return Group(
        buffer,
        None if every else torch.tensor(values).to(device, non_blocking=True),
        Take.of(grid.flatten(), len(position), device),
        (grid.shape[0], grid.shape[1]),
        base,
        sees_near[grid].unsqueeze(1).to(device, non_blocking=True),
    ), grid.flatten()


def _plan_long(
    where: Rows, lengths: Sequence[int], state: LayerState, reach: int, keep: bool, device: torch.device
) -> tuple[LongPlan, Rows]:
    size = reach // 2
    buffers = tuple(referenced(where)[1])
    layout = _Sources(where, lengths, state, buffers)
    none = torch.zeros(0, dtype=torch.int64)
    starts: list[Tensor] = []
    keys: list[Tensor] = []
    blocks = 0
    chosen: tuple[_Items, _Items] = ([], [])  # without and with a mask of their own
    for r, length in enumerate(lengths):
        own, seen = layout.own(r), where.seen[r]
        done = 0
        if seen == 0:
            done = min(length, 2 * size)
            starts.append(own[:done])
            keys.append(own if length > done else none)
        else:
            history = layout.history(r, 2 * size)
            keys.append(torch.cat([history.new_full((2 * size - len(history),), -1), history, own]))
        rest = own[done:].split(size) if length > done else ()
        short_of = 2 * size - seen if 0 < seen < reach - 1 else 0  # slots before the sequence begins
        for i, part in enumerate(rest):
            hidden = max(short_of - i * size, 0)
            chosen[hidden > 0].append((blocks + 2 + i, part, hidden))
        if len(keys[-1]):
            blocks += -(-len(keys[-1]) // size)
            keys[-1] = _padded(keys[-1], size * -(-len(keys[-1]) // size))
    longest = max(map(len, starts), default=0)
    plain, masked = chosen
    flat = torch.cat(
        [
            *(_padded(part, longest) for part in starts),
            *(_padded(part, size) for _, part, _ in (*plain, *masked)),
        ]
    )
    total = sum(lengths)
    relative = torch.where(flat < 0, flat, flat - layout.first)
    window, slots, where = layout.window(reach, keep, device)
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return LongPlan(
        buffers,
        Take.of(relative, total, device),
        (len(starts), longest),
        Take.of(flat[: len(starts) * longest], layout.size, device),
        Take.of(torch.cat(keys) if keys else none, layout.size, device),
        _triples(plain, device),
        _triples(masked, device),
        size,
        *_masks(masked, size, reach, device),
        window,
        slots,
        layout.packed(reach, device) if flash else None,
    ), where


def _padded(index: Tensor, length: int) -> Tensor:
    return F.pad(index, (0, length - len(index)), value=-1)


def _masks(masked: _Items, size: int, reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which keys of its three blocks a query sees, and the same without what lies before the sequence."""
    slot, query = torch.arange(3 * size), torch.arange(size)[:, None] + 2 * size
    band = (slot <= query) & (slot > query - reach)
    visible = (slot >= torch.tensor([hidden for _, _, hidden in masked]).view(-1, 1))[:, None, None]
    return band.to(device, non_blocking=True), (band & visible).to(device, non_blocking=True)


def _triples(items: _Items, device: torch.device) -> Tensor:
    """Each block and the two before it, in order: [3 * blocks]."""
    blocks = torch.tensor([block for block, _, _ in items], dtype=torch.int64)
    return (blocks[:, None] + torch.arange(-2, 1)).flatten().to(device, non_blocking=True)


class _Sources:
    """Where keys lie when window buffers, tail and new tokens are concatenated."""

    def __init__(self, where: Rows, lengths: Sequence[int], state: LayerState, buffers: tuple[int, ...]) -> None:
        self.where, self.lengths = where, lengths
        self.offset, self.width, place = {}, {}, 0
        for b in buffers:
            rows, _, self.width[b], _ = state.window[b][0].shape
            self.offset[b] = place
            place += rows * self.width[b]
        self.tail, self.tail_width = place, 0
        if state.tail is not None:
            self.tail_width = state.tail[0].shape[1]
            place += len(lengths) * self.tail_width
        self.first = place
        self.size = place + sum(lengths)
        ends = torch.tensor(list(lengths)).cumsum(0).tolist()
        self.ends = [place + end for end in ends]

    def own(self, row: int) -> Tensor:
        """The row's new tokens."""
        return torch.arange(self.ends[row] - self.lengths[row], self.ends[row])

    def history(self, row: int, count: int) -> Tensor:
        """At most ``count`` tokens right before them."""
        buffer, u, start = self.where.window[row]
        border, seen = self.where.border[row], self.where.seen[row]
        first = max(start, seen - count)
        parts = []
        if buffer != NOWHERE and first < border:
            base = self.offset[buffer] + u * self.width[buffer] - start
            parts.append(torch.arange(base + first, base + border))
        base = self.tail + row * self.tail_width - border
        parts.append(torch.arange(base + max(first, border), base + max(seen, border)))
        return torch.cat(parts)

    def window(self, reach: int, keep: bool, device: torch.device) -> tuple[Take | None, int, Rows]:
        """Every row's last W-1 tokens after the pass, and the references to them."""
        if not keep:
            return None, 0, self.where
        parts = []
        for row in range(len(self.lengths)):
            own = self.own(row)
            missing = max(reach - 1 - len(own), 0)
            parts.append(torch.cat([self.history(row, missing), own[max(len(own) - reach + 1, 0) :]]))
        after = [seen + length for seen, length in zip(self.where.seen, self.lengths, strict=True)]
        index = pad_sequence(parts, batch_first=True, padding_value=-1)
        window = tuple(
            (0, r, end - len(part)) if end else (NOWHERE, 0, 0)
            for r, (end, part) in enumerate(zip(after, parts, strict=True))
        )
        where = replace(self.where, window=window, border=tuple(after))
        return Take.of(index.flatten(), self.size, device), index.shape[1], where

    def packed(self, reach: int, device: torch.device) -> tuple[Take, Tensor, Tensor, int, int]:
        """History and new tokens of all rows concatenated, as flash-attn's variable-length kernel wants them."""
        parts = [torch.cat([self.history(row, reach - 1), self.own(row)]) for row in range(len(self.lengths))]
        borders = [
            F.pad(torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(
                device, non_blocking=True
            )
            for sizes in (list(self.lengths), [len(part) for part in parts])
        ]
        return Take.of(torch.cat(parts), self.size, device), *borders, max(self.lengths), max(map(len, parts))  # type: ignore[return-value]
