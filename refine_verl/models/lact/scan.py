"""Running the fast weights over tokens of many sequences, each somewhere in its own chunk.

A pass is cut where chunks begin: step j holds, of every sequence, the tokens that fall into its j-th chunk. Which
tokens those are depends on lengths and positions alone, so it is worked out once (:class:`ScanPlan`) and carried out in
every layer, with as many batched matmuls as there are steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refine_verl.models.lact.configuration import LaCTConfig
from refine_verl.models.lact.fast_weights import ChunkTokens, FastWeights, Matrices, read, updater
from refine_verl.models.lact.state import NOWHERE, LayerState, Rows, referenced
from refine_verl.models.lact.take import Take

NEW = -1
"""Buffer index of the pass's own tokens."""
_MANY_LOTS = 16
_MANY_PIECES = 32

Pieces = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Write:
    """One batch of updates.

    Attributes:
        sources: (buffer, sets) of the fast weights to start from, one after the other.
        chunks: for each of these sets the C tokens of its chunk: (buffer, first, count), or (NEW, segment, count).
    """

    sources: tuple[tuple[int, tuple[int, ...]], ...]
    chunks: tuple[Pieces, ...]


@dataclass(frozen=True)
class Read:
    """One batch of evaluations: ``sets`` of a buffer, ``count`` tokens each (fewer are filled up)."""

    buffer: int
    sets: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class ScanPlan:
    """See the module.

    Attributes:
        steps: the updates that come first and the evaluations that follow.
        reads: layout of the tokens for the evaluations.
        segments: lengths of the pieces into which the steps cut the tokens in their order; None without updates.
        initial: buffer index of the initial weights, None if no row starts here.
        refs: (buffer, set) for each row after the pass, and before it for a row without tokens.
        history: the same at every step, for the rows that have tokens in it.
    """

    steps: tuple[tuple[Write | None, tuple[Read, ...]], ...]
    reads: Take
    segments: tuple[int, ...] | None
    initial: int | None
    refs: tuple[tuple[int, int], ...]
    history: tuple[dict[int, tuple[int, int]], ...]


def plan_scan(where: Rows, lengths: Sequence[int], lots: int, chunk: int, device: torch.device) -> ScanPlan:
    """Args:
    where: the rows' references before the pass.
    lengths: tokens of each row, 0 allowed.
    lots: number of buffers of fast weights there are.
    chunk: C.
    device: of the tensors.
    """
    pieces = [_cut(seen, length, chunk) for seen, length in zip(where.seen, lengths, strict=True)]
    numbers: list[range] = []
    starts: list[list[int]] = []
    segments: list[int] = []
    place = 0
    for parts in pieces:
        numbers.append(range(len(segments), len(segments) + len(parts)))
        starts.append([place + sum(parts[:j]) for j in range(len(parts))])
        segments += parts
        place += sum(parts)
    refs, initial = list(where.fast), None
    if any(refs[r][0] == NOWHERE and lengths[r] for r in range(len(refs))):
        initial, lots = lots, lots + 1
        refs = [(initial, 0) if b == NOWHERE and lengths[r] else (b, u) for r, (b, u) in enumerate(refs)]
    steps, history, order, writes = [], [], [], False
    for j in range(max((len(parts) for parts in pieces), default=0)):
        active = [r for r, parts in enumerate(pieces) if len(parts) > j]
        crossing = [r for r in active if j > 0 or (where.seen[r] and where.seen[r] % chunk == 0)]
        write = None
        if crossing:
            crossing.sort(key=lambda r: refs[r])
            contents = tuple(_content(where, r, j, chunk, numbers[r], pieces[r]) for r in crossing)
            write = Write(_grouped([refs[r] for r in crossing]), contents)
            refs = list(refs)
            for u, r in enumerate(crossing):
                refs[r] = (lots, u)
            lots, writes = lots + 1, True
        reads, index = _reads([(refs[r], starts[r][j], pieces[r][j]) for r in active])
        order += index
        steps.append((write, reads))
        history.append({r: refs[r] for r in active})
    taken = torch.cat(order) if order else torch.zeros(0, dtype=torch.int64)
    return ScanPlan(
        tuple(steps),
        Take.of(taken, place, device),
        tuple(segments) if writes else None,
        initial,
        tuple(refs),
        tuple(history),
    )


def _cut(seen: int, length: int, chunk: int) -> list[int]:
    """Lengths of the pieces of ``length`` tokens from position ``seen`` on, cut where chunks begin."""
    parts = []
    while length:
        part = min(length, chunk - seen % chunk)
        parts.append(part)
        seen, length = seen + part, length - part
    return parts


def _content(where: Rows, row: int, j: int, chunk: int, numbers: range, parts: list[int]) -> Pieces:
    """The chunk that is full before step ``j``."""
    content = where.open[row] if j == 0 or (j == 1 and where.seen[row] % chunk) else ()
    if j:
        content = (*content, (NEW, numbers[j - 1], parts[j - 1]))
    assert sum(count for _, _, count in content) == chunk
    return content


def _grouped(refs: list[tuple[int, int]]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Sorted references by buffer."""
    groups: dict[int, list[int]] = {}
    for buffer, u in refs:
        groups.setdefault(buffer, []).append(u)
    return tuple((buffer, tuple(sets)) for buffer, sets in groups.items())


def _reads(jobs: list[tuple[tuple[int, int], int, int]]) -> tuple[tuple[Read, ...], list[Tensor]]:
    """Jobs (reference, first token, count) by the weights they need; all tokens of one set side by side."""
    by_set: dict[tuple[int, int], list[Tensor]] = {}
    for ref, start, count in jobs:
        by_set.setdefault(ref, []).append(torch.arange(start, start + count))
    reads, index = [], []
    for buffer, sets in _grouped(sorted(by_set)):
        tokens = [torch.cat(by_set[buffer, u]) for u in sets]
        reads.append(Read(buffer, sets, max(map(len, tokens))))
        index.append(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1).flatten())
    return tuple(reads), index


def scan(
    config: LaCTConfig,
    plan: ScanPlan,
    state: LayerState,
    initial: FastWeights | None,
    norms: Matrices | None,
    q: Tensor,
    tokens: ChunkTokens,
) -> tuple[Tensor, list[FastWeights]]:
    """Carry out a plan in one layer.

    Args:
        config: of the model.
        plan: of this pass.
        state: of this layer before the pass.
        initial: one set, what fresh sequences start with; None where none does and nothing is updated.
        norms: n_i, row norms of the initial weights; None in the same case.
        q: fast queries [tokens, h, d].
        tokens: what updates need, [tokens, ..].

    Returns:
        What the fast weights say to every token, [tokens, h, d], and all lots of fast weights, old and new.
    """
    lots = list(state.fast)
    if plan.initial is not None:
        assert initial is not None
        lots.append(initial)
    pieces = None if plan.segments is None else _split(tokens, plan.segments)
    change = updater(config.compile_fast_weights)
    queries = plan.reads(q)
    outputs, at = [], 0
    for write, reads in plan.steps:
        if write is not None:
            assert pieces is not None and norms is not None
            sources = FastWeights.join([lots[buffer].select(sets) for buffer, sets in write.sources])
            lots.append(change(config, sources, norms, _gather_chunks(write.chunks, state.open, pieces)))
        for job in reads:
            count = len(job.sets) * job.count
            u = queries[at : at + count].unflatten(0, (len(job.sets), job.count)).transpose(1, 2)
            outputs.append(read(lots[job.buffer].select(job.sets).used, u).transpose(1, 2).flatten(0, 1))
            at += count
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return plan.reads.inverse(out), lots


def _split(tokens: ChunkTokens, sizes: tuple[int, ...]) -> list[ChunkTokens]:
    """All segments at once: the gradient then is one concatenation instead of one full-size sum for each."""
    columns = [part.split(sizes) if part is not None else (None,) * len(sizes) for part in tokens]
    return [ChunkTokens(*parts) for parts in zip(*columns, strict=True)]


def _gather_chunks(
    chunks: tuple[Pieces, ...], buffers: tuple[ChunkTokens, ...], segments: list[ChunkTokens]
) -> ChunkTokens:
    """Full chunks side by side: [A, C, ..]."""

    def pick(field: int) -> Tensor | None:
        parts = []
        for content in chunks:
            for buffer, first, count in content:
                source = segments[first][field] if buffer == NEW else buffers[buffer][field]
                if source is None:
                    return None
                parts.append(source if buffer == NEW else source[first : first + count])
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        return joined.unflatten(0, (len(chunks), -1))

    k, v, rates = pick(0), pick(1), pick(2)
    assert k is not None and v is not None and rates is not None
    return ChunkTokens(k, v, rates, pick(3))


# What is kept


@dataclass(frozen=True)
class Keep:
    """How the buffers of a layer become those of the state after the pass.

    Attributes:
        where: references after the pass.
        fast: lots to keep; ``merge`` (lot, sets) to put into a single one instead.
        open: buffers to keep as they are, ``moved`` the ones whose tokens go, as ``take`` says, into one new buffer
            behind them. The pass's own tokens are the last buffer.
    """

    where: Rows
    fast: tuple[int, ...]
    merge: tuple[tuple[int, tuple[int, ...]], ...] | None
    open: tuple[int, ...]
    moved: tuple[int, ...]
    take: Take | None


def plan_keep(
    where: Rows, lengths: Sequence[int], plan: ScanPlan, sizes: Sequence[int], chunk: int, device: torch.device
) -> Keep:
    """Args:
    where: references before the pass; ``window`` and ``border`` are passed on.
    lengths: tokens of each row.
    plan: of the pass.
    sizes: tokens in each buffer of open chunks, the pass's own last.
    chunk: C.
    device: of the tensors.
    """
    own, start = len(sizes) - 1, 0
    pieces: list[Pieces] = []
    for seen, length, before in zip(where.seen, lengths, where.open, strict=True):
        after = seen + length
        first = max(chunk * ((after - 1) // chunk), 0)  # position at which the open chunk begins
        if length == 0 or (seen and first == chunk * ((seen - 1) // chunk)):
            kept, first = before, seen
        else:
            kept, first = (), max(first, seen)
        pieces.append((*kept, *([(own, start + first - seen, after - first)] if length else [])))
        start += length
    total = tuple(seen + length for seen, length in zip(where.seen, lengths, strict=True))
    where = replace(where, seen=total, fast=plan.refs, open=tuple(pieces))
    used, merge = referenced(where)[0], None
    refs = sorted({ref for ref in where.fast if ref[0] != NOWHERE})
    if len(used) > _MANY_LOTS:
        merge, places = _grouped(refs), {ref: (0, i) for i, ref in enumerate(refs)}
    else:
        places = {(b, u): (used.index(b), u) for b, u in refs}
    where = replace(where, fast=tuple(places.get(ref, (NOWHERE, 0)) for ref in where.fast))
    opened, kept_open, moved, take = _keep_open(where.open, sizes, device)
    return Keep(replace(where, open=opened), tuple(used), merge, kept_open, moved, take)


def _keep_open(
    rows: tuple[Pieces, ...], sizes: Sequence[int], device: torch.device
) -> tuple[tuple[Pieces, ...], tuple[int, ...], tuple[int, ...], Take | None]:
    """Put small buffers together when there are many, and copy what is needed out of large ones when it is little."""
    distinct = {piece for pieces in rows for piece in pieces}
    used = sorted({buffer for buffer, _, _ in distinct})
    needed = dict.fromkeys(used, 0)
    for buffer, _, count in distinct:
        needed[buffer] += count
    moved = [b for b in used if 2 * needed[b] <= sizes[b]]
    if len(used) > _MANY_PIECES:
        largest = max(sizes[b] for b in used)
        small = [b for b in used if 2 * sizes[b] <= largest]
        moved = sorted({*moved, *(small if 2 * len(small) > len(used) else used)})
    kept = [b for b in used if b not in moved]
    names = {b: i for i, b in enumerate(kept)}
    offsets = dict(zip(moved, torch.tensor([0] + [sizes[b] for b in moved]).cumsum(0).tolist(), strict=False))
    places: dict[tuple[int, int, int], int] = {}
    index: list[Tensor] = []
    total = 0
    renamed = []
    for pieces in rows:
        mine: list[tuple[int, int, int]] = []
        for b, first, n in pieces:
            if b in names:
                mine.append((names[b], first, n))
                continue
            if (b, first, n) not in places:
                places[b, first, n] = total
                index.append(torch.arange(offsets[b] + first, offsets[b] + first + n))
                total += n
            place = places[b, first, n]
            if mine and mine[-1][0] == len(kept) and mine[-1][1] + mine[-1][2] == place:
                mine[-1] = (len(kept), mine[-1][1], mine[-1][2] + n)
            else:
                mine.append((len(kept), place, n))
        renamed.append(tuple(mine))
    take = Take.of(torch.cat(index), sum(sizes[b] for b in moved), device) if moved else None
    return tuple(renamed), tuple(kept), tuple(moved), take


def keep_fast(keep: Keep, lots: list[FastWeights]) -> tuple[FastWeights, ...]:
    """The lots of the state after the pass."""
    if keep.merge is None:
        return tuple(lots[b] for b in keep.fast)
    return (FastWeights.join([lots[b].select(sets) for b, sets in keep.merge]),)


def keep_open(keep: Keep, buffers: Sequence[ChunkTokens]) -> tuple[ChunkTokens, ...]:
    """The open tokens of the state after the pass."""
    kept = tuple(buffers[b] for b in keep.open)
    if keep.take is None:
        return kept
    take: Callable[[Tensor], Tensor] = keep.take
    columns = zip(*(buffers[b] for b in keep.moved), strict=True)
    parts = [None if column[0] is None else take(torch.cat([p for p in column if p is not None])) for column in columns]
    return (*kept, ChunkTokens(*parts))  # type: ignore[arg-type]
