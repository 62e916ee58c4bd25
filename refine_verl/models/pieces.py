"""Many rollouts in pieces, so that few copies of the state exist at a time (``refine.nsp.rollouts_together``)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from refine_verl.models.state import FastWeightState

Body = Callable[[Tensor, FastWeightState, Tensor], tuple[Tensor, ...]]
"""What is done with a piece: its ``last`` [p, d], its state [p] rows, not forked yet, and its ``rows`` [p, m, k].

All that it returns is [p, m, ...].
"""


def even_sizes(total: int, most: int) -> list[int]:
    """As few sizes of at most ``most`` as add up to ``total``, as equal as possible."""
    count = -(-total // most)
    return [total // count + (index < total % count) for index in range(count)]


def piece_sizes(positions: int, copies: int, together: int) -> tuple[list[int], list[int]]:
    """How ``positions`` and the ``copies`` of each are divided, so that no piece has more than ``together`` rollouts.

    Pieces are of whole positions; only if one position's copies are too many, these are divided, too. A function of
    settings and of the number of documents alone: under FSDP every rank has to make the same number of passes.
    """
    return even_sizes(positions, max(1, together // copies)), even_sizes(copies, together)


def piece_count(positions: int, copies: int, together: int) -> int:
    """Pieces of `piece_sizes`."""
    of_positions, of_copies = piece_sizes(positions, copies, together)
    return len(of_positions) * len(of_copies)


def in_pieces(body: Body, last: Tensor, state: FastWeightState, rows: Tensor, together: int) -> tuple[Tensor, ...]:
    """``body`` piece by piece, and what it returned put together.

    Args:
        body: see `Body`.
        last: [P, d], hidden states at P positions.
        state: [P] rows, after them.
        rows: [P, n, k], of the n rollouts from each: their tokens, or the numbers that decide them.
        together: most rollouts of a piece; see `piece_sizes`.

    Returns:
        What ``body`` returns, [P, n, ...].
    """
    of_positions, of_copies = piece_sizes(rows.shape[0], rows.shape[1], together)
    if len(of_positions) == len(of_copies) == 1:
        return body(last, state, rows)
    done = []
    for start, own, part in zip(
        last.split(of_positions), state.split(of_positions), rows.split(of_positions), strict=True
    ):
        columns = zip(*(body(start, own, some) for some in part.split(of_copies, dim=1)), strict=True)
        done.append(tuple(torch.cat(column, dim=1) for column in columns))
    return tuple(torch.cat(column) for column in zip(*done, strict=True))
