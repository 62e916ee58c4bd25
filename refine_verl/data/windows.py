"""Which pieces of which documents become sequences, and the account of everything left out."""

from __future__ import annotations

import dataclasses

import numpy as np

from refine_verl.data.statistics import DataStatistics


@dataclasses.dataclass(frozen=True)
class WindowPlan:
    """Sequences to cut, in document order.

    Attributes:
        document: int64 [N], index of the document.
        window: int64 [N], 0-based number of the window within its document.
        start: int64 [N], first token.
        length: int64 [N], number of tokens.
        statistics: the account.
    """

    document: np.ndarray
    window: np.ndarray
    start: np.ndarray
    length: np.ndarray
    statistics: DataStatistics


def plan_windows(lengths: np.ndarray, *, max_length: int | None, min_length: int, policy: str) -> WindowPlan:
    """Decide the sequences for documents of the given lengths.

    Args:
        lengths: int64 [D], tokens of each document.
        max_length: most tokens of a sequence; None keeps documents whole.
        min_length: fewest tokens of a sequence, at least 1 and at most `max_length`.
        policy: `window` (consecutive pieces of max_length; a last one below min_length is dropped) or `head`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    size = max_length if max_length is not None else int(max(lengths.max(initial=1), 1))
    pieces = -(-lengths // size) if policy == "window" else np.ones_like(lengths)
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), pieces)
    window = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = window * size
    length = np.minimum(lengths[document] - start, size)
    keep = length >= min_length
    document, window, start, length = document[keep], window[keep], start[keep], length[keep]
    kept = len(np.unique(document))
    tokens_kept = int(length.sum())
    statistics = DataStatistics(
        documents=len(lengths),
        kept=kept,
        too_short=len(lengths) - kept,
        cut=int((lengths > size).sum()),
        windows=len(document),
        tokens_kept=tokens_kept,
        tokens_dropped=int(lengths.sum()) - tokens_kept,
        min_length=int(length.min(initial=size)) if len(length) else 0,
        mean_length=tokens_kept / len(length) if len(length) else 0.0,
        max_length=int(length.max(initial=0)),
        longest_document=int(lengths.max(initial=0)),
    )
    return WindowPlan(document, window, start, length, statistics)
