"""Prompts that begin with the same context: it is read once, whatever the number of questions about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

LEAST = 256
"""Fewest tokens that are worth a pass of their own: instructions that all prompts of a task begin with are shorter."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that are read and continued together.

    Attributes:
        rows: their numbers.
        shared: how many of their first tokens are the same for all of them and are read once; 0: none.
        first: whether they are the first ones with this beginning, which therefore has to be read.
    """

    rows: list[int]
    shared: int
    first: bool

    def read(self, lengths: Sequence[int]) -> list[int]:
        """Tokens that are read for each row, of prompts of these lengths; a beginning counts for the first row."""
        again = [length - self.shared for length in lengths]
        return [again[0] + self.shared * self.first, *again[1:]]


def batches(prompts: Sequence[Sequence[int] | np.ndarray], size: int, *, share: bool) -> Iterator[Batch]:
    """All prompts, ``size`` at a time; first, in their order, those that share nothing.

    Args:
        prompts: token ids, int [T], at least one each.
        size: of a batch.
        share: False: none shares anything.
    """
    groups = _groups([np.asarray(row, np.uint32) for row in prompts]) if share else []
    grouped = {row for rows, _ in groups for row in rows}
    alone = [row for row in range(len(prompts)) if row not in grouped]
    for rows, shared in [(alone, 0), *groups]:
        for start in range(0, len(rows), size):
            yield Batch(rows[start : start + size], shared, start == 0)


def _groups(prompts: Sequence[np.ndarray]) -> list[tuple[list[int], int]]:
    """Rows with the length of what they begin with, for each group of at least two."""
    # in the order of their tokens, prompts that begin alike are neighbours
    order = sorted(range(len(prompts)), key=lambda row: prompts[row].astype(">u4").tobytes())
    found: list[tuple[list[int], int]] = []
    for row in order:
        rows, shared = found[-1] if found else ([], 0)
        common = min(_common(prompts[rows[0]], prompts[row]), shared or len(prompts[row])) if rows else 0
        # one more prompt may make the beginning shorter: only where fewer tokens are read in all
        if common >= LEAST and common * len(rows) >= shared * (len(rows) - 1):
            found[-1] = ([*rows, row], common)
        else:
            found.append(([row], 0))
    return [(sorted(rows), shared) for rows, shared in found if len(rows) > 1]


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many first tokens are the same; each prompt keeps one to itself, to be continued from."""
    most = min(len(one), len(other)) - 1
    different = np.flatnonzero(one[:most] != other[:most])
    return int(different[0]) if len(different) else most
