"""What one pass over a document leaves behind: the state after any of its tokens.

Positions are chosen by the entropy that the pass itself yields, so their states are asked for only afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refine_verl.models.packing import Documents, Packed, pack
from refine_verl.models.state import FastWeightState

Run = Callable[[Packed, FastWeightState | None, bool], tuple[Tensor, FastWeightState | None]]
"""A pass, such as ``Passes.run``: tokens and state in, hidden states and state out."""


class Trace(Protocol):
    """The states that a pass over a micro-batch of documents went through."""

    def after(self, positions: Tensor) -> FastWeightState:
        """States after x_t for every position.

        Args:
            positions: int64 [N, c] on the CPU: the host has to look at them.

        Returns:
            [N * c] rows, document by document.
        """
        ...


@dataclass(frozen=True)
class KnownStates:
    """The states at positions that a pass was told beforehand.

    Attributes:
        state: [N * c] rows.
    """

    state: FastWeightState

    def after(self, positions: Tensor) -> FastWeightState:
        """See :class:`Trace`; no other positions may be asked for."""
        return self.state


@dataclass(frozen=True)
class Snapshots:
    """States kept at a few places; those in between are reached by replaying tokens from the nearest one before.

    Attributes:
        documents: what was read.
        kept: for each place the index of its next token in each document, and the state before it.
        run: continues from a state.
    """

    documents: Documents
    kept: list[tuple[list[int], FastWeightState]]
    run: Run

    def after(self, positions: Tensor) -> FastWeightState:
        """See :class:`Trace`; one pass, over the distances to the snapshots."""
        picks, runs = [], []
        for b, row in enumerate(positions.tolist()):
            for t in row:
                index = max(i for i, (starts, _) in enumerate(self.kept) if starts[b] <= t)
                picks.append((index, b))
                runs.append(self.documents.tokens[b, self.kept[index][0][b] : t + 1])
        _, state = self.run(pack(runs), FastWeightState.gather([state for _, state in self.kept], picks), True)
        assert state is not None
        return state


@dataclass(frozen=True)
class Segment:
    """What a pass over one segment of all documents gives.

    Attributes:
        packed: the tokens.
        starts, stops: its borders in each document, [N].
        hidden: [tokens, d], in the order of the runs.
        state: after the segment; None unless asked for.
    """

    packed: Packed
    starts: list[int]
    stops: list[int]
    hidden: Tensor
    state: FastWeightState | None

    @property
    def last(self) -> Tensor:
        """Hidden state [N, d] at the last token of each run."""
        return self.hidden[self.packed.last]


def read_segments(
    run: Run, documents: Documents, borders: list[list[int]], keep_last: bool = False
) -> Iterator[Segment]:
    """Read S one segment after the other, the state carried from each to the next.

    Args:
        run: makes a pass.
        documents: S.
        borders: of the segments, [N] each; a document that has ended reads its first token again, and nothing may
            look at that.
        keep_last: whether the state after the last segment is wanted.
    """
    # a constant that needs a gradient all the same: see `FastWeightState.detach`
    state = None if documents.before is None else documents.before.detach()
    for index, (starts, stops) in enumerate(zip(borders, borders[1:], strict=False)):
        packed = documents.cut(starts, stops)
        hidden, state = run(packed, state, keep_last or index < len(borders) - 2)
        yield Segment(packed, starts, stops, hidden, state)


def read_with_snapshots(run: Run, documents: Documents, segments: int) -> tuple[list[Tensor], Snapshots]:
    """One pass over S that keeps the state at even intervals; works for every model.

    Returns:
        Hidden states [T, d] of each document, and the states before the segments.
    """
    parts: list[list[Tensor]] = []
    kept: list[tuple[list[int], FastWeightState]] = []
    for part in read_segments(run, documents, documents.even_cuts(segments), keep_last=True):
        pieces = zip(part.hidden.split(part.packed.lengths), part.starts, part.stops, strict=True)
        parts.append([piece[: stop - start] for piece, start, stop in pieces])
        assert part.state is not None
        kept.append((part.stops, part.state))
    before = kept[-1][1].zeros_like() if documents.before is None else documents.before
    fresh = ([0] * len(documents), before)
    return [torch.cat(column) for column in zip(*parts, strict=True)], Snapshots(documents, [fresh, *kept[:-1]], run)
