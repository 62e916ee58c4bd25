"""How token rows are laid out in chunks for the delta-rule and convolution stand-ins.

A *plan* is a pure function of the sequence lengths, so it is cached and shared by all layers and all
operators of a forward pass. Sequences are padded to a multiple of the chunk size only, never to the longest
one, and a chunk never holds tokens of two sequences: every matrix product is a batch entry that belongs to
exactly one sequence. A document's result here is then that of the document alone, bit for bit as far as the library
computes an entry of a batch the same whatever their number. (The projections around it are products of all rows,
whose last bits may depend on how many rows there are.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

MAX_CHUNK = 64
"""Largest chunk. 128 is a third slower on CPUs; 32 saves arithmetic but doubles the sequential steps."""

_MIN_CHUNK = 8
# Cost model of `choose_chunk`, in multiply-adds: what one sequential step costs before any arithmetic. Fitted
# on a two-core machine; it only has to tell "one long document" from "many short ones".
_STEP_OVERHEAD = 1.5e6


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """Layout of ``n`` sequences in ``sum(active)`` chunks of ``chunk`` tokens, ordered by (step, sequence).

    Attributes:
        chunk: tokens per chunk.
        sequences: number of sequences, empty ones included.
        active: number of sequences that own a chunk at each sequential step; never increases.
        order: ``[n]`` sequence index of each state row, longest first; ``None`` if in given order.
        inverse: inverse permutation of ``order``; ``None`` like it.
        gather: ``[chunks * chunk]`` packed token of each slot; padding repeats the last token of its own
            sequence. ``None`` where the rows are equally long and divide into chunks, so that a view does.
        slot: ``[tokens]`` slot of each packed token; ``None`` like ``gather``.
        padding: ``[chunks * chunk]`` true for padding slots; ``None`` where there are none.
    """

    chunk: int
    sequences: int
    active: tuple[int, ...]
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    gather: torch.Tensor | None = None
    slot: torch.Tensor | None = None
    padding: torch.Tensor | None = None

    def to(self, device: torch.device) -> ChunkPlan:
        """The same with its tensors on a device."""
        fields: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return ChunkPlan(**fields)


def sequence_lengths(batch: int, tokens: int, cu_seqlens: torch.Tensor | None) -> tuple[int, ...]:
    """Return the length of every sequence of a ``[batch, tokens]`` input.

    Args:
        batch: number of rows; 1 when ``cu_seqlens`` is given.
        tokens: row length.
        cu_seqlens: ``[n + 1]`` int32/int64 cumulative lengths of a packed row, or ``None`` for equal rows.

    Raises:
        ValueError: if ``cu_seqlens`` comes with more than one row, decreases, or does not span the row.
    """
    if cu_seqlens is None:
        return (tokens,) * batch
    if batch != 1:
        raise ValueError(f"cu_seqlens needs one packed row: expected batch size 1, got {batch}")
    bounds = cu_seqlens.tolist()
    lengths = tuple(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    if not lengths or bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to the row length {tokens}, got {bounds}")
    return lengths


def choose_chunk(lengths: tuple[int, ...], head_dim: int = 64) -> int:
    """Return the chunk size with the least estimated work for sequences of these lengths."""
    longest = max(lengths)
    if longest <= _MIN_CHUNK or (longest <= MAX_CHUNK and min(lengths) == longest):
        return max(longest, 1)
    candidates = [size for size in (_MIN_CHUNK, 16, 32) if size < longest] + [min(longest, MAX_CHUNK)]

    def cost(size: int) -> float:
        chunks = sum(-(-length // size) for length in lengths)
        per_chunk = size * (3.0 * size + 4.0 * head_dim) * head_dim
        return chunks * per_chunk + -(-longest // size) * _STEP_OVERHEAD

    return min(candidates, key=cost)


@functools.lru_cache(maxsize=32)
def chunk_plan(
    lengths: tuple[int, ...], *, chunk: int | None = None, head_dim: int = 64, device: torch.device | None = None
) -> ChunkPlan:
    """Return the layout for sequences of these lengths.

    Args:
        lengths: tokens per sequence; zero is allowed.
        chunk: chunk size, or ``None`` to choose it from the lengths.
        head_dim: size of a head's key, a hint for the choice.
        device: of the plan's tensors; the CPU by default.

    Returns:
        The plan. Its tensors are shared between callers: never write into them.
    """
    size = chunk or choose_chunk(lengths, head_dim)
    steps = [-(-length // size) for length in lengths]
    active = tuple(sum(s > i for s in steps) for i in range(max(steps)))
    if len(set(lengths)) == 1 and lengths[0] % size == 0:
        return ChunkPlan(chunk=size, sequences=len(lengths), active=active)
    # Built outside inference mode: the cached tensors may later be used under autograd.
    with torch.inference_mode(False):
        plan = _ragged_plan(torch.tensor(lengths), torch.tensor(steps), size, active)
        return plan if device is None else plan.to(device)


def _ragged_plan(lengths: torch.Tensor, steps: torch.Tensor, size: int, active: tuple[int, ...]) -> ChunkPlan:
    """Build the index tensors of a plan whose sequences need padding or differ in length."""
    order = torch.argsort(steps, descending=True, stable=True)
    inverse = torch.argsort(order)
    first_token = lengths.cumsum(0) - lengths
    counts = torch.tensor(active, dtype=torch.long)
    first_chunk = counts.cumsum(0) - counts
    step = torch.repeat_interleave(torch.arange(len(active)), counts)
    sequence = order[torch.arange(int(counts.sum())) - first_chunk[step]]
    offset = step[:, None] * size + torch.arange(size)
    padding = offset >= lengths[sequence, None]
    last = (lengths[sequence, None] - 1).clamp_min(0)
    gather = (first_token[sequence, None] + torch.minimum(offset, last)).flatten()

    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    position = torch.arange(len(owner)) - first_token[owner]
    token_step = position // size
    slot = (first_chunk[token_step] + inverse[owner]) * size + position % size
    in_order = bool((order == torch.arange(len(order))).all())
    return ChunkPlan(
        chunk=size,
        sequences=len(lengths),
        active=active,
        order=None if in_order else order,
        inverse=None if in_order else inverse,
        gather=gather,
        slot=slot,
        padding=padding.flatten() if bool(padding.any()) else None,
    )


def from_chunks(x: torch.Tensor, shape: torch.Size, plan: ChunkPlan, groups: int = 1) -> torch.Tensor:
    """From chunks ``[M, chunk, D]`` to rows of the ``shape`` ``[B, T, H, D]``, without padding."""
    batch, tokens, heads, width = shape
    batch = batch if plan.gather is None else 1
    x = x.view(-1, batch, heads, groups, plan.chunk, width)
    x = x.sum(3) if groups > 1 else x.squeeze(3)
    x = x.permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, width)
    return x if plan.slot is None else x[0].index_select(0, plan.slot).view(shape)
