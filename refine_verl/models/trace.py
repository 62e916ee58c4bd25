"""What one pass over a document leaves behind: the state after any of its tokens.

Positions are chosen by the entropy that the pass itself yields, so their states are asked for only afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refine_verl.models.packing import Documents, Packed, pack
from refine_verl.models.state import FastWeightState

Run = Callable[[Packed, FastWeightState | None, bool], tuple[Tensor, FastWeightState | None]]
"""``FastWeightActor.run``: tokens and state in, hidden states and state out."""


class Trace(Protocol):
    """The states that a pass over a micro-batch of documents went through."""

    def after(self, positions: Tensor) -> FastWeightState:
        """States after x_t for every position.

        Args:
            positions: int64 [N, c].

        Returns:
            [N * c] rows, document by document.
        """
        ...


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


def read_in_segments(run: Run, documents: Documents, segments: int) -> tuple[list[Tensor], Snapshots]:
    """One pass over S that keeps the state at even intervals; works for every model.

    Returns:
        Hidden states [T, d] of each document, and the states before the segments.
    """
    borders = documents.even_cuts(segments)
    parts: list[list[Tensor]] = []
    kept: list[tuple[list[int], FastWeightState]] = []
    state: FastWeightState | None = None
    for starts, stops in zip(borders, borders[1:], strict=False):
        if state is not None:
            kept.append((starts, state))
        # a document that has ended reads any token instead: nothing looks at its state any more
        packed = documents.cut(starts, [max(stop, start + 1) for start, stop in zip(starts, stops, strict=True)])
        hidden, state = run(packed, state, True)
        pieces = zip(hidden.split(packed.lengths), starts, stops, strict=True)
        parts.append([piece[: stop - start] for piece, start, stop in pieces])
    assert state is not None
    kept.insert(0, (borders[0], state.zeros_like()))
    return [torch.cat(column) for column in zip(*parts, strict=True)], Snapshots(documents, kept, run)
