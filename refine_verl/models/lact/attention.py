"""Sliding-window attention from a state: a query sees itself and the W-1 tokens before it.

Long runs of tokens are cut into blocks of half a window; a block attends to itself and the two before it, so memory
grows with T * W. Short ones (decoding, branches) attend to the state where it lies, in two matmuls, and are put
into the tail of the state instead of moving the window. As with the fast weights, everything that only depends on
lengths and positions is worked out once per pass.

Shapes: H attention heads of D features, R rows, P slots of a window buffer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from refine_verl.models.lact.state import NOWHERE, LayerState, Rows, referenced
from refine_verl.models.lact.take import Take

_SHORT_RUN = 16
_LONGEST_TAIL = 64
Pair = tuple[Tensor, Tensor]


def rotary_table(positions: Tensor, config: Any, dtype: torch.dtype) -> Pair:
    """cos and sin [tokens, 1, D / 2] for positions [tokens], computed in at least float32 and rounded to ``dtype``."""
    precise = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=precise) / config.head_dim
    angle = positions.to(precise)[:, None, None] * (1.0 / config.rope_theta**exponent)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, table: Pair) -> Tensor:
    """x [tokens, H, D]: features i and i + D/2 are turned together; computed in at least float32."""
    precise = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(precise) for part in table)
    first, second = x.to(precise).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


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
        tail: whether there is a tail to read.
        queries: tokens -> those of starts, blocks and masked blocks.
        starts: (rows, tokens) of sequences that begin here, up to a window; ``start_keys`` leads to their keys.
        blocks: keys -> blocks; ``plain`` and ``masked`` name the three blocks each block of queries attends to.
        size: of a block.
        band: bool [size, 3 * size].
        holes: bool [masked, 1, size, 3 * size]: the band without what lies before a sequence.
        back: outputs -> tokens.
        window: keys -> R * slots, the window after the pass; None if no state is kept.
        slots: P of it.
        packed: for flash-attn: keys, cumulative lengths of queries and keys, longest of each.
    """

    buffers: tuple[int, ...]
    tail: bool
    queries: Take
    starts: tuple[int, int]
    start_keys: Take
    blocks: Take
    plain: Tensor
    masked: Tensor
    size: int
    band: Tensor
    holes: Tensor
    back: Take
    window: Take | None
    slots: int
    packed: tuple[Take, Tensor, Tensor, int, int] | None


Plan = ShortPlan | LongPlan


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
            width = None if buffer == NOWHERE else state.window[buffer][0].shape[2]
            total = 1 if buffer == NOWHERE else state.window[buffer][0].shape[0]
            group, grid = _group(where, mine, buffer, total, width, position, sees_near, reach, device)
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
    total: int,
    width: int | None,
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
    if width is not None:
        start = torch.tensor([s for _, _, s in where.window])
        at = start[:, None, None] + torch.arange(width)
        sees = (at < torch.tensor(where.border)[:, None, None]) & (at > position[..., None] - reach)
        base = sees[grid].unsqueeze(1).to(device)
    every = values == list(range(total))
    return Group(
        buffer,
        None if every else torch.tensor(values, device=device),
        Take.of(grid.flatten(), len(position), device),
        (grid.shape[0], grid.shape[1]),
        base,
        sees_near[grid].unsqueeze(1).to(device),
    ), grid.flatten()


def _plan_long(
    where: Rows, lengths: Sequence[int], state: LayerState, reach: int, keep: bool, device: torch.device
) -> tuple[LongPlan, Rows]:
    size = reach // 2
    buffers = tuple(referenced(where)[1])
    layout = _Sources(where, lengths, state, buffers)
    none = torch.zeros(0, dtype=torch.int64)
    starts, queries, keys, blocks = [], [], [], 0
    plain, masked, empty, plain_queries, masked_queries = [], [], [], [], []
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
        known = min(seen, reach - 1) if seen else done
        for i, part in enumerate(rest):
            hidden = 2 * size - known - i * size if seen else 0  # slots before the sequence or its window
            (masked if hidden > 0 and known < reach - 1 else plain).append(blocks + 2 + i)
            if hidden > 0 and known < reach - 1:
                empty.append(hidden)
                masked_queries.append(part)
            else:
                plain_queries.append(part)
        if len(keys[-1]):
            blocks += -(-len(keys[-1]) // size)
            keys[-1] = _padded(keys[-1], size * -(-len(keys[-1]) // size))
    longest = max(map(len, starts), default=0)
    queries = [
        *(_padded(part, longest) for part in starts),
        *(_padded(part, size) for part in (*plain_queries, *masked_queries)),
    ]
    flat = torch.cat(queries)
    total = sum(lengths)
    relative = torch.where(flat < 0, flat, flat - layout.first)
    back = torch.full((total,), -1)
    back[relative[relative >= 0]] = torch.arange(len(flat))[relative >= 0]
    slot, query = torch.arange(3 * size), torch.arange(size)[:, None] + 2 * size
    band = ((slot <= query) & (slot > query - reach)).to(device)
    visible = (slot >= torch.tensor(empty)[:, None])[:, None, None] if empty else slot.new_zeros(0, 1, 1, 1).bool()
    window, slots, where = layout.window(reach, keep, device)
    return LongPlan(
        buffers,
        state.tail is not None,
        Take.of(relative, total, device),
        (len(starts), longest),
        Take.of(flat[: len(starts) * longest], layout.size, device),
        Take.of(torch.cat(keys) if keys else none, layout.size, device),
        _triples(plain, device),
        _triples(masked, device),
        size,
        band,
        band & visible.to(device),
        Take.of(back, len(flat), device),
        window,
        slots,
        layout.packed(reach, device) if _flash_available(device) else None,
    ), where


def _padded(index: Tensor, length: int) -> Tensor:
    return F.pad(index, (0, length - len(index)), value=-1)


def _triples(blocks: list[int], device: torch.device) -> Tensor:
    """Each block and the two before it, in order: [3 * blocks]."""
    return (torch.tensor(blocks, dtype=torch.int64)[:, None] + torch.tensor([-2, -1, 0])).flatten().to(device)


class _Sources:
    """Where keys lie when window buffers, tail and new tokens are put behind each other."""

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
        """History and new tokens of all rows behind each other, as flash-attn's variable-length kernel wants them."""
        parts = [torch.cat([self.history(row, reach - 1), self.own(row)]) for row in range(len(self.lengths))]
        borders = [
            F.pad(torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)
            for sizes in (list(self.lengths), [len(part) for part in parts])
        ]
        return Take.of(torch.cat(parts), self.size, device), *borders, max(self.lengths), max(map(len, parts))  # type: ignore[return-value]


def _flash_available(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None


def attend(
    plan: Plan | None, state: LayerState, window: int | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, LayerState]:
    """Carry out a plan in one layer.

    Args:
        plan: of this pass.
        state: of this layer before the pass.
        window: W.
        q, k, v: rotated queries and keys, and values, [tokens, H, D].

    Returns:
        [tokens, H, D] and ``state`` with window and tail of after the pass.
    """
    if plan is None:
        return v, state
    return _short(plan, state, q, k, v) if isinstance(plan, ShortPlan) else _long(plan, state, window, q, k, v)


def _short(plan: ShortPlan, state: LayerState, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, LayerState]:
    rows, length, near = plan.shape
    q = plan.queries(q).unflatten(0, (rows, length))
    kept = [
        plan.near(new if state.tail is None else torch.cat([state.tail[i].flatten(0, 1), new])).unflatten(
            0, (rows, near)
        )
        for i, new in enumerate((k, v))
    ]
    outputs = [_short_group(group, state, q, kept[0], kept[1]) for group in plan.groups]
    out = plan.back(torch.cat(outputs) if len(outputs) > 1 else outputs[0])
    return out, replace(state, tail=(kept[0], kept[1]))


def _short_group(group: Group, state: LayerState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [R, L, H, D], near k and v [R, n, H, D] -> [U * G * L, H, D]."""
    q, k, v = (
        group.rows(part).unflatten(0, group.grid).permute(0, 3, 1, 2, 4) for part in (q, k, v)
    )  # [U, H, G, L, D]
    q = q * q.shape[-1] ** -0.5
    masks, scores = [group.near], [q @ k.mT]
    base = None
    if group.base is not None:
        base = state.window[group.buffer]
        if group.values is not None:
            base = (base[0].index_select(0, group.values), base[1].index_select(0, group.values))
        masks.insert(0, group.base)
        scores.insert(0, (q.flatten(2, 3) @ base[0].to(q.dtype).mT).unflatten(2, q.shape[2:4]))
    mask, score = torch.cat(masks, dim=-1), torch.cat(scores, dim=-1)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    # not -inf: a place without a row sees nothing at all
    weights = score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(dim=-1).to(v.dtype)
    split = 0 if base is None else base[0].shape[2]
    out = weights[..., split:] @ v
    if base is not None:
        out = out + (weights[..., :split].flatten(2, 3) @ base[1].to(v.dtype)).unflatten(2, q.shape[2:4])
    return out.permute(0, 2, 3, 1, 4).flatten(0, 2)


def _long(
    plan: LongPlan, state: LayerState, window: int | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, LayerState]:
    keys, values = (
        _behind_each_other([state.window[b][i] for b in plan.buffers], state.tail[i] if state.tail else None, new)
        for i, new in enumerate((k, v))
    )
    if plan.packed is not None and q.dtype in (torch.float16, torch.bfloat16):
        out = _flash(plan.packed, window, q, keys, values)
    else:
        out = plan.back(torch.cat(list(_blocks(plan, plan.queries(q), keys, values))))
    if plan.window is None:
        return out, state
    take, rows = plan.window, (-1, plan.slots)
    kept = tuple(take(part).unflatten(0, rows).transpose(1, 2).contiguous() for part in (keys, values))
    return out, replace(state, window=((kept[0], kept[1]),), tail=None)


def _behind_each_other(buffers: list[Tensor], tail: Tensor | None, new: Tensor) -> Tensor:
    if not buffers and tail is None:
        return new
    parts = [buffer.transpose(1, 2).flatten(0, 1) for buffer in buffers]
    return torch.cat([*parts, *([] if tail is None else [tail.flatten(0, 1)]), new]).to(new.dtype)


def _blocks(plan: LongPlan, q: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
    """Outputs in the order of ``plan.queries``, [.., H, D] each."""
    rows, length = plan.starts
    outputs, at = [], rows * length
    if at:
        parts = (q[:at], plan.start_keys(keys), plan.start_keys(values))
        out = _sdpa(*(part.unflatten(0, (rows, length)) for part in parts), is_causal=True)
        outputs.append(out)
    if len(plan.plain) + len(plan.masked):
        blocks = [plan.blocks(part).unflatten(0, (-1, plan.size)) for part in (keys, values)]
        for triples, mask in ((plan.plain, plan.band), (plan.masked, plan.holes)):
            if len(triples):
                count = len(triples) // 3
                mine = [part.index_select(0, triples).unflatten(0, (count, 3)).flatten(1, 2) for part in blocks]
                queries = q[at : at + count * plan.size].unflatten(0, (count, plan.size))
                outputs.append(_sdpa(queries, *mine, attn_mask=mask))
                at += count * plan.size
    return outputs


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """[rows, tokens, H, D] -> [rows * tokens, H, D]."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **kwargs).transpose(1, 2).flatten(0, 1)


def _flash(
    packed: tuple[Take, Tensor, Tensor, int, int], window: int | None, q: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    take, borders_q, borders_k, longest_q, longest_k = packed
    out = flash_attn_varlen_func(
        q,
        take(keys),
        take(values),
        cu_seqlens_q=borders_q,
        cu_seqlens_k=borders_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    assert isinstance(out, Tensor)
    return out
