"""LaCT under REFINE: packed runs from a state to a state, and documents whose every state can be had afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from refine_verl.models.lact.modeling import LaCTModel, LayerTrace
from refine_verl.models.lact.scan import ScanPlan
from refine_verl.models.lact.state import NOWHERE, LaCTState, LayerState, Rows
from refine_verl.models.lact.take import windows
from refine_verl.models.packing import Documents, Packed
from refine_verl.models.state import FastWeightState


class LaCTAdapter:
    """The model concatenates runs of unequal length anyway, so there is nothing to pad."""

    def run(
        self, model: nn.Module, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        """See `ModelAdapter.run`."""
        trunk = cast(LaCTModel, model.base_model)
        before = None if state is None else state.tree
        done = trunk.run(trunk.embeddings(packed.tokens.flatten()), packed.lengths, before, keep=keep_state)
        hidden = done.hidden.unflatten(0, packed.tokens.shape)
        return hidden, None if done.state is None else FastWeightState(done.state)

    def trace(self, model: nn.Module, documents: Documents) -> tuple[list[Tensor], LaCTTrace]:
        """See `TracingAdapter.trace`: one ordinary pass, in which every state lies ready."""
        trunk = cast(LaCTModel, model.base_model)
        packed = documents.whole
        done = trunk.run(trunk.embeddings(packed.tokens.flatten()), packed.lengths, trace=True)
        assert done.plan is not None
        config = trunk.config
        trace = LaCTTrace(documents.lengths, done.plan, done.trace, config.lact_chunk_size, config.window_size)
        return list(done.hidden.split(packed.lengths)), trace


@dataclass(frozen=True)
class LaCTTrace:
    """All that a pass over documents computed and a state may be made of.

    Fast weights and open chunks of a state are references into it, without copies; windows are copied for the chosen
    positions only.

    Attributes:
        lengths: T of each document.
        plan: of the pass.
        layers: k, v, open tokens of all documents concatenated, and the fast weights of every chunk.
        chunk, window: C and W.
    """

    lengths: tuple[int, ...]
    plan: ScanPlan
    layers: tuple[LayerTrace, ...]
    chunk: int
    window: int | None

    def after(self, positions: Tensor) -> FastWeightState:
        """States after x_t for positions [N, c]: [N * c] rows, document by document."""
        starts = [sum(self.lengths[:b]) for b in range(len(self.lengths))]
        rows: list[tuple[Any, ...]] = []
        spans = []
        for b, row in enumerate(positions.tolist()):
            for t in row:
                step = t // self.chunk
                known = t + 1 if self.window is None else min(t + 1, self.window - 1)
                slot = (NOWHERE, 0, 0) if self.window == 1 else (0, len(rows), t + 1 - known)
                open_ = (0, starts[b] + step * self.chunk, t + 1 - step * self.chunk)
                rows.append((t + 1, self.plan.history[step][b], slot, t + 1, (open_,)))
                spans.append((starts[b] + t + 1 - known, starts[b] + t + 1))
        where = Rows(*zip(*rows, strict=True))
        layers = tuple(
            LayerState(
                layer.lots,
                () if self.window == 1 else ((windows(layer.k, spans), windows(layer.v, spans)),),
                None,
                (layer.tokens,),
            )
            for layer in self.layers
        )
        return FastWeightState(LaCTState(where, layers).compact())
