"""Hybrids under REFINE: linear layers whose states are forked, and attention layers whose keys and values are shared.

The layers run one after the other as the model's own trunk would run them, with its parameters, norms and rotations.
Two things are ours: what a linear layer does with its state (`mixers`), and what an attention layer attends to
(`attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from refine_verl.kernels.cuts import Cuts, Places
from refine_verl.kernels.patch import cpu_kernels_in_use, wrap_operators
from refine_verl.kernels.recording import Recorder, active_recorder, record_states
from refine_verl.models import adapters
from refine_verl.models.hybrid.attention import AttentionPlan
from refine_verl.models.hybrid.experts import balance_loss, combined, watched
from refine_verl.models.hybrid.families import Family, Tokens, family_of
from refine_verl.models.hybrid.mixers import LinearState
from refine_verl.models.hybrid.state import KeyValue, SharedKeys
from refine_verl.models.packing import Documents, Packed
from refine_verl.models.recompute import checkpointed, states_at
from refine_verl.models.replaced import LayerForward, replaced_forward
from refine_verl.models.state import FastWeightState
from refine_verl.models.trace import KnownStates, Trace

_recomputed: ContextVar[bool] = ContextVar("refine_verl_hybrid_recomputed", default=False)


@dataclass
class Pass:
    """One pass over packed tokens.

    Attributes:
        tokens: of the pass.
        before: keys and values of every attention layer; rows before their first token where there is no state.
        linear: states of the linear layers; None before the first token.
        made: keys and values of the tokens, by layer.
        after: states of the linear layers after them, by layer.
        taken: whether ``after`` is at the places the recorder names instead.
        routes: int64 [tokens], which experts they went to, by layer that has experts.
        balances: whether ``logits`` are wanted.
        logits: [tokens, E] of the routers, by layer.
    """

    tokens: Tokens
    before: SharedKeys
    linear: Sequence[LinearState | None]
    made: dict[int, KeyValue] = field(default_factory=dict)
    after: dict[int, LinearState] = field(default_factory=dict)
    taken: bool = False
    routes: dict[int, Tensor] = field(default_factory=dict)
    balances: bool = False
    logits: dict[int, Tensor] = field(default_factory=dict)

    @property
    def state(self) -> FastWeightState:
        """The state after the pass."""
        keys = self.before.extended(self.tokens.packed.lengths, list(self.made.values()))
        return FastWeightState({"linear": tuple(self.after.values()), "attention": keys})


class HybridAdapter:
    """Models of transformers and fla whose layers are linear ones or softmax attention (`families`).

    Attributes:
        grows: states become larger with every token (`SharedKeys.bytes_per_token` says how much).
    """

    grows = True
    balances = False
    _routes: Tensor | None = None
    _logits: Sequence[Tensor] = ()
    _routes_each = 0

    def run(
        self, model: nn.Module, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        """See `ModelAdapter.run`."""
        hidden, done = self._run(model, packed, state, keep_state)
        return hidden, done.state if keep_state else None

    def trace(
        self, model: nn.Module, documents: Documents, positions: Tensor | None = None
    ) -> tuple[list[Tensor], Trace]:
        """See `TracingAdapter.trace`: one pass; keys and values of a prefix are the first ones of the document."""
        wrap_operators()
        places = None if positions is None else Places.of(positions)
        packed, cuts = documents.whole, None
        if self.cuts_operators():
            pieces = -(-max(documents.lengths) // adapters.TOKENS_PER_PIECE)
            cuts = Cuts.even(documents.lengths, pieces, documents.tokens.device)
        with record_states(cuts, places) as recorder:
            hidden, done = self._run(model, packed, None, keep=True)
        parts = list(hidden.flatten(0, 1).split(packed.lengths))
        trace = HybridTrace(done.state, recorder)
        if done.taken and places is not None:
            tree = done.state.tree
            return parts, KnownStates(
                FastWeightState({**tree, "attention": tree["attention"].cut_at(places.sequences, places.positions)})
            )
        return parts, trace

    @contextmanager
    def recomputed_layers(self, model: nn.Module) -> Iterator[None]:
        """See `RecomputingAdapter`."""
        token = _recomputed.set(True)
        try:
            yield
        finally:
            _recomputed.reset(token)

    def cuts_operators(self) -> bool:
        """Whether operators have to be cut for the states inside a pass; the stand-ins for the CPU know theirs."""
        return not cpu_kernels_in_use()

    def routes(self) -> Tensor | None:
        """See `RoutingAdapter`."""
        return self._routes

    def balance_loss(self) -> Tensor:
        """See `RoutingAdapter`."""
        logits, self._logits = self._logits, ()
        return balance_loss(logits, self._routes_each)

    def _run(self, model: nn.Module, packed: Packed, state: FastWeightState | None, keep: bool) -> tuple[Tensor, Pass]:
        trunk: Any = model.base_model
        family = family_of(trunk.config)
        linear = family.linear_layers(trunk)
        if state is None:
            before = SharedKeys.empty(len(packed.lengths), len(linear) - sum(linear))
            states: Sequence[LinearState | None] = (None,) * sum(linear)
        else:
            before, states = state.tree["attention"], state.tree["linear"]
        hidden = family.embed(trunk, packed.tokens)
        plan, positions = AttentionPlan.of(before, packed.lengths, hidden.device), Tokens.positions_of(packed, before)
        tokens = Tokens(packed, keep, plan, positions, family.rotations(trunk, hidden, positions))
        done = Pass(tokens, before, states, balances=self.balances and state is None and torch.is_grad_enabled())
        layers = _Layers(family, done, trunk.layers, linear, _counted(linear), _recomputed.get())
        with replaced_forward(trunk.layers, layers.run):
            for layer in trunk.layers:
                hidden, _ = layer(hidden)
        self._routes = combined([done.routes[index] for index in sorted(done.routes)])
        if done.balances:
            self._logits, self._routes_each = list(done.logits.values()), trunk.config.num_experts_per_tok
        return trunk.norm(hidden), done


class DeltaRuleHybridAdapter(HybridAdapter):
    """Those whose linear layers have the (gated) delta rule, one write a token."""

    def write_norms(self, trace: Trace) -> Tensor:
        """See `WritesAdapter`: those of the linear layers, the fast weights."""
        assert isinstance(trace, HybridTrace)
        return trace.recorder.write_norms()


@dataclass(frozen=True)
class HybridTrace:
    """What a pass over documents leaves behind.

    Attributes:
        final: the state after it.
        recorder: how the linear layers got there.
    """

    final: FastWeightState
    recorder: Recorder

    def after(self, positions: Tensor) -> FastWeightState:
        """See `Trace`."""
        places = Places.of(positions)
        linear = FastWeightState(self.final.tree["linear"]).map(lambda tensor: self.recorder.at(tensor, places))
        keys = self.final.tree["attention"].cut_at(places.sequences, places.positions)
        return FastWeightState({"linear": linear.tree, "attention": keys})


def _counted(linear: Sequence[bool]) -> list[int]:
    """Of each layer its number among those of its kind."""
    return [sum(kind == other for other in linear[:index]) for index, kind in enumerate(linear)]


@dataclass(frozen=True)
class _Layers:
    """How the layers of a trunk run in one pass, by number.

    Attributes:
        family: how one of them runs.
        done: the pass.
        layers: the trunk's.
        linear: whether each of them is a linear one.
        places: of each its number among those of its kind.
        recomputed: whether a layer runs again in the backward pass.
    """

    family: Family
    done: Pass
    layers: Sequence[Any]
    linear: Sequence[bool]
    places: Sequence[int]
    recomputed: bool

    def run(self, forward: LayerForward, index: int, hidden: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """A decoder layer, called as the module is: hidden states, and the tensors of the state that it leaves."""
        before, recorder = self._before(index), active_recorder()
        if not (self.recomputed and torch.is_grad_enabled()):
            out, logits, after = self._from_state(forward, index, hidden, before)
            tensors: Sequence[Tensor] = after.tensors if after is not None else ()
        else:

            def body(hidden: Tensor, state: FastWeightState | None) -> tuple[Any, FastWeightState | None]:
                recording = nullcontext() if recorder is None else record_states(recorder.cuts, recorder.places)
                with recording as inner:
                    out, logits, after = self._from_state(forward, index, hidden, state)
                if self.linear[index] and inner is not None and inner.places is not None and after is not None:
                    after = states_at(inner, after, inner.places)
                return (out, logits), after

            (out, logits), after, tensors = checkpointed(body, hidden, before)
            self.done.taken = recorder is not None and recorder.places is not None
        if after is not None:
            (self.done.after if self.linear[index] else self.done.made)[index] = after.tree
        if logits:
            self.done.logits[index] = logits[0]
        # these are outputs of the layer, too: FSDP2 has to gather its parameters before their backward pass
        return out, [*tensors, *logits]

    def _before(self, index: int) -> FastWeightState | None:
        place = self.places[index]
        if not self.linear[index]:
            return FastWeightState(self.done.before.layers[place])
        state = self.done.linear[place]
        return None if state is None else FastWeightState(state)

    def _from_state(
        self, forward: LayerForward, index: int, hidden: Tensor, before: FastWeightState | None
    ) -> tuple[Tensor, list[Tensor], FastWeightState | None]:
        """A layer: hidden states, its router's logits if they are wanted, and the state it leaves."""
        layer, tokens, logits = self.layers[index], self.done.tokens, list[Tensor]()
        experts = self.family.experts(layer)
        if experts is not None:
            keep = functools.partial(self.done.routes.__setitem__, index)
            forward = watched(forward, experts, keep, logits.append if self.done.balances else lambda _: None)
        if self.linear[index]:
            state = None if before is None else before.tree
            out, after = self.family.linear(forward, layer, tokens, hidden, state)
            return out, logits, None if after is None else FastWeightState(after)
        assert before is not None
        out, made = self.family.attention(forward, layer, tokens, hidden, before.tree)
        return out, logits, FastWeightState(made) if tokens.keep else None
