"""LaCT under REFINE: packed runs from a state to a state, and documents whose every state can be had afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from refine_verl.models.lact.modeling import LaCTModel, LayerTrace, Pass, TakeStates
from refine_verl.models.lact.scan import ScanPlan
from refine_verl.models.lact.state import NOWHERE, LaCTState, LayerState, Rows, referenced
from refine_verl.models.lact.take import windows
from refine_verl.models.packing import Documents, Packed
from refine_verl.models.recompute import checkpointed
from refine_verl.models.replaced import LayerForward, replaced_forward
from refine_verl.models.state import FastWeightState
from refine_verl.models.trace import KnownStates


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

    def trace(
        self, model: nn.Module, documents: Documents, positions: Tensor | None = None
    ) -> tuple[list[Tensor], LaCTTrace | KnownStates]:
        """See `TracingAdapter.trace`: one ordinary pass, in which every state lies ready."""
        trunk = cast(LaCTModel, model.base_model)
        packed = documents.whole
        config = trunk.config
        chunk, window = config.lact_chunk_size, config.window_size
        embedded = trunk.embeddings(packed.tokens.flatten())
        if positions is None:
            done = trunk.run(embedded, packed.lengths, trace=True)
            assert done.plan is not None
            return list(done.hidden.split(packed.lengths)), LaCTTrace(
                documents.lengths, done.plan, done.trace, chunk, window
            )
        made: list[StatesAt] = []

        def take(plan: ScanPlan) -> TakeStates:
            made.append(StatesAt.of(documents.lengths, plan, positions, chunk, window))
            return made[0].take

        done = trunk.run(embedded, packed.lengths, trace=True, take=take)
        return list(done.hidden.split(packed.lengths)), KnownStates(made[0].state(done.trace))

    def recomputed_layers(self, model: nn.Module) -> AbstractContextManager[None]:
        """See `RecomputingAdapter`."""
        return replaced_forward(cast(LaCTModel, model.base_model).layers, _recomputed_layer)


def _recomputed_layer(
    forward: LayerForward, index: int, hidden: Tensor, run: Pass, state: LayerState
) -> tuple[Any, ...]:
    """A layer that is computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return cast("tuple[Any, ...]", forward(hidden, run, state))

    def body(hidden: Tensor, before: FastWeightState | None) -> tuple[Tensor, FastWeightState | None]:
        assert before is not None
        out, after = forward(hidden, run, before.tree.layers[0])
        return out, None if after is None else _one_layer(after)

    out, after, tensors = checkpointed(body, hidden, _one_layer(state))
    # the states are outputs of the layer, too: FSDP2 has to gather its parameters before their backward pass
    return out, None if after is None else after.tree.layers[0], tensors


def _one_layer(state: LayerState) -> FastWeightState:
    """Its tensors can be listed and replaced; nobody looks at the rows."""
    return FastWeightState(LaCTState(Rows.fresh(0), (state,)))


@dataclass(frozen=True)
class StatesAt:
    """How the states after some tokens of a pass are made of what its layers computed.

    Fast weights and open chunks of a state are references into it, without copies; windows are copied.

    Attributes:
        where: what each row refers to.
        spans: first and last token of each row's window, among the tokens of all documents.
        window: W.
    """

    where: Rows
    spans: list[tuple[int, int]]
    window: int | None

    @classmethod
    def of(cls, lengths: Sequence[int], plan: ScanPlan, positions: Tensor, chunk: int, window: int | None) -> StatesAt:
        """For positions [N, c] in documents of ``lengths``: [N * c] rows, document by document."""
        starts = [sum(lengths[:b]) for b in range(len(lengths))]
        rows: list[tuple[Any, ...]] = []
        spans = []
        for b, row in enumerate(positions.tolist()):
            for t in row:
                step = t // chunk
                known = t + 1 if window is None else min(t + 1, window - 1)
                slot = (NOWHERE, 0, 0) if window == 1 else (0, len(rows), t + 1 - known)
                open_ = (0, starts[b] + step * chunk, t + 1 - step * chunk)
                rows.append((t + 1, plan.history[step][b], slot, t + 1, (open_,)))
                spans.append((starts[b] + t + 1 - known, starts[b] + t + 1))
        return cls(Rows(*zip(*rows, strict=True)), spans, window)

    def take(self, layer: LayerTrace) -> LayerState:
        """One layer's buffers, without those that no row refers to."""
        return LaCTState(self.where, (self._buffers(layer),)).compact().layers[0]

    def state(self, layers: Sequence[LayerState]) -> FastWeightState:
        """The state, from what `take` made of all layers."""
        fast, window, open_ = ({b: i for i, b in enumerate(kept)} for kept in referenced(self.where))
        return FastWeightState(LaCTState(self.where.renumber(fast, window, open_), tuple(layers)))

    def _buffers(self, layer: LayerTrace) -> LayerState:
        windowed = () if self.window == 1 else ((windows(layer.k, self.spans), windows(layer.v, self.spans)),)
        return LayerState(layer.lots, windowed, None, (layer.tokens,))


@dataclass(frozen=True)
class LaCTTrace:
    """All that a pass over documents computed and a state may be made of.

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
        states = StatesAt.of(self.lengths, self.plan, positions, self.chunk, self.window)
        return states.state([states.take(layer) for layer in self.layers])
