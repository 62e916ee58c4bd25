"""Fork inside the operator: the state after any token of a pass, from kernels that give out final states only.

fla's layers look their operators up in their modules when they are called. `recorded` wraps an operator there; outside
a session (`recording.record_states` with `Cuts`) it changes nothing. Inside one the operator runs in a few pieces, the
state carried from each to the next by its public arguments, and its inputs and the states between the pieces are
remembered. The states after any tokens then come from one more call of the same operator: from the last border before
each token to it, all of them packed together. The state of a causal convolution is a slice of its input.

Everything is plain autograd through public arguments, so it serves reading and training, on every device.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refine_verl.kernels.cuts import Cuts, Lookup, Operator, Places, parameters, with_steps
from refine_verl.kernels.recording import Kept, active_recorder, keep, last_states_wanted, no_recording
from refine_verl.kernels.writes import write_norms

PER_TOKEN = ("q", "k", "v", "g", "gk", "beta")
"""Arguments of fla's operators whose second dimension counts tokens, or steps of a token (``num_householder``)."""

BORDERS = ("cu_seqlens", "cu_seqlens_cpu", "chunk_indices")
"""Arguments that say where sequences begin; made anew for every piece."""


NORMALISES = "use_qk_l2norm_in_kernel"
"""The option with which operators first bring queries and keys to unit length."""


@dataclass(frozen=True)
class _Kept:
    """A per-token argument as rows, ``steps`` for every token."""

    rows: Kept
    steps: int


@dataclass(frozen=True)
class OperatorHistory:
    """Of one call of an operator that was cut.

    Attributes:
        operator: fla's, or what stands in for it.
        cuts: where.
        tokens: its per-token arguments but for q.
        unit: entries of q for every token.
        options: its other arguments.
        before: the state before each piece, a row for each of the piece's documents; None before the first token.
        final: the state after the last token of each document.
    """

    operator: Operator
    cuts: Cuts
    tokens: dict[str, _Kept]
    unit: int
    options: dict[str, Any]
    before: Sequence[Tensor | None]
    final: Tensor

    def at(self, places: Places) -> Tensor:
        """See `recording.History`."""
        lookup = self.cuts.lookup(places)
        state = self._start(lookup)
        if torch.is_grad_enabled() and not state.requires_grad:
            state.requires_grad_()  # some of fla's backward passes need an initial state that does
        replayed = {name: self._read(x, lookup) for name, x in self.tokens.items()}
        # what is asked of the state does not change it: the first key of each token stands for the query
        queries = {"q": replayed["k"][:, :: self.tokens["k"].steps // self.unit]}
        bounds = self.cuts.bounds(self.operator, ("replayed", places, self.unit), lookup.lengths, self.unit)
        with no_recording():
            _, final = self.operator(
                **queries, **replayed, **self.options, **bounds, initial_state=state, output_final_state=True
            )
        assert final is not None
        return final

    def write_norms(self) -> Tensor:
        """See `recording.History`; by one more call of the operator, uncut."""
        lengths, rows = self.cuts.lengths, self.cuts.rows
        bounds = {} if rows else self.cuts.bounds(self.operator, "whole", lengths, 1)
        flat = {name: x.rows.tensors[""] for name, x in self.tokens.items()}
        tokens = {name: x.unflatten(0, (len(lengths) if rows else 1, -1)) for name, x in flat.items()}
        with no_recording(), torch.no_grad():
            return write_norms(self.operator, tokens, {**self.options, **bounds}, self.before[0])

    def _start(self, lookup: Lookup) -> Tensor:
        """The states before the pieces that the places are in: [R, ...]."""
        if lookup.pieces == (0,) and self.before[0] is None:
            return self.final.new_zeros(len(lookup.places.positions), *self.final.shape[1:])
        before = [self.before[index] for index in lookup.pieces]
        states = [self._zero_state() if state is None else state for state in before]
        table = states[0] if len(states) == 1 else torch.cat(states)
        return table if lookup.rows is None else table.index_select(0, lookup.rows)

    def _zero_state(self) -> Tensor:
        """The state before the first token; every layer's is the same."""
        key = ("none", self.final.shape, self.final.dtype)
        return self.cuts.tensor(key, lambda: torch.zeros_like(self.final))

    def _read(self, x: _Kept, lookup: Lookup) -> Tensor:
        steps = x.steps
        tokens = self.cuts.tensor(("replayed tokens", lookup.places, steps), lambda: with_steps(lookup.tokens, steps))
        return x.rows.take("", tokens).unsqueeze(0)


@dataclass(frozen=True)
class ConvolutionHistory:
    """Of one call of a causal convolution.

    Attributes:
        cuts: for the layout of documents.
        inputs: "", [B * T, D], W of them are a state.
        initial: [N, D, W], the inputs before the first of these; None if there are none.
        width: W.
    """

    cuts: Cuts
    inputs: Kept
    initial: Tensor | None
    width: int

    def at(self, places: Places) -> Tensor:
        """See `recording.History`: [R, D, W]."""
        index = self.cuts.tensor(("convolution", places, self.width), lambda: self._rows(places))
        taken = self.inputs.take("", index).view(len(places.positions), self.width, -1)
        if min(places.positions) + 1 < self.width:
            taken = self._with_those_before(taken, places)
        return taken.transpose(1, 2).contiguous()

    def write_norms(self) -> None:
        """See `recording.History`: nothing is written."""

    def _rows(self, places: Places) -> Tensor:
        """[R * W]: which inputs; of those before a document's first token any."""
        first = torch.tensor(self.cuts.first)[list(places.sequences)]
        return (first[:, None] + self._at(places).clamp(min=0)).flatten()

    def _at(self, places: Places) -> Tensor:
        return torch.tensor(places.positions)[:, None] + torch.arange(1 - self.width, 1)

    def _with_those_before(self, taken: Tensor, places: Places) -> Tensor:
        """``taken`` [R, W, D] with the inputs before the first tokens in their places."""
        at = self._at(places)
        device = taken.device
        outside = (at < 0).unsqueeze(-1).to(device, non_blocking=True)
        if self.initial is None:
            return taken.masked_fill(outside, 0)
        rows = torch.tensor(places.sequences)[:, None] * self.width + (at % self.width)
        before = self.initial.transpose(1, 2).flatten(0, 1)[rows.to(device, non_blocking=True)]
        return torch.where(outside, before.to(taken.dtype), taken)


def recorded(operator: Operator) -> Operator:
    """An operator that is cut while states are recorded, and is itself otherwise.

    Raises:
        RuntimeError: in a session, for a per-token argument that is not in `PER_TOKEN`: it would not be cut.
    """

    @functools.wraps(operator)
    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        recorder = active_recorder()
        given = {**dict(zip(parameters(operator), args, strict=False)), **kwargs}
        if not (given.get("output_final_state") and last_states_wanted()):
            return operator(**{**given, "output_final_state": False})
        if recorder is None or recorder.cuts is None:
            return operator(*args, **kwargs)
        with no_recording():
            out, final, history = _run_in_pieces(operator, given, recorder.cuts)
        recorder.add(final, history)
        return out, final

    call.uncut = operator  # type: ignore[attr-defined]
    return call


def recorded_convolution(operator: Operator) -> Operator:
    """A causal convolution whose inputs are remembered while states are recorded."""

    @functools.wraps(operator)
    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        recorder = active_recorder()
        given = {**dict(zip(parameters(operator), args, strict=False)), **kwargs}
        if not (given.get("output_final_state") and last_states_wanted()):
            return operator(**{**given, "output_final_state": False})
        if recorder is None or recorder.cuts is None:
            return operator(*args, **kwargs)
        width, cuts = given["weight"].shape[-1], recorder.cuts
        given["x"], inputs = keep(given["x"])
        last = given["x"][:, -width:].transpose(1, 2)
        # the state is what was read last: the operator is spared it, and a gradient of zeros for it
        given["output_final_state"] = not (cuts.rows and last.shape[-1] == width)
        with no_recording():
            out, final = operator(**given)
        final = last if final is None else final
        recorder.add(final, ConvolutionHistory(cuts, inputs, given.get("initial_state"), width))
        return out, final

    call.uncut = operator  # type: ignore[attr-defined]
    return call


def _run_in_pieces(operator: Operator, given: dict[str, Any], cuts: Cuts) -> tuple[Tensor, Tensor, OperatorHistory]:
    tokens = {name: given[name] for name in PER_TOKEN if given.get(name) is not None}
    _refuse_unknown(operator, given, tokens["q"])
    left_out = (*tokens, *BORDERS, "initial_state", "output_final_state")
    options = {name: value for name, value in given.items() if name not in left_out}
    if options.get(NORMALISES):  # once, not in every piece and again for the states
        tokens |= {name: _normalised(tokens[name]) for name in ("q", "k")}
        options[NORMALISES] = False
    unit = cuts.steps(tokens["q"])
    kept: dict[str, _Kept] = {}
    for name in tokens.keys() - {"q"}:
        tokens[name], rows = keep(tokens[name])
        kept[name] = _Kept(rows, cuts.steps(tokens[name]))
    parts = {name: cuts.split(x) for name, x in tokens.items()}
    outputs: list[Tensor] = []
    before: list[Tensor | None] = []
    ends: list[Tensor] = []
    for index in range(len(cuts.pieces)):
        state = cuts.carry(ends[-1], index) if index else given.get("initial_state")
        piece = {name: part[index] for name, part in parts.items()}
        bounds = cuts.borders(operator, index, unit)
        out, after = operator(**piece, **options, **bounds, initial_state=state, output_final_state=True)
        assert after is not None
        before.append(state)
        outputs.append(out)
        ends.append(after)
    final = cuts.last(ends)
    return (
        cuts.join(outputs, tokens["q"].shape[0]),
        final,
        OperatorHistory(operator, cuts, kept, unit, options, before, final),
    )


def _normalised(x: Tensor) -> Tensor:
    """[..., K], each vector of unit length, by the function that fla's operators would use, or its stand-in."""
    normalised: Tensor = importlib.import_module("fla.modules.norm.l2norm").l2norm(x)
    return normalised


def _refuse_unknown(operator: Operator, given: dict[str, Any], q: Tensor) -> None:
    known = (*PER_TOKEN, *BORDERS, "initial_state")
    batch, lengths = q.shape[0], {q.shape[1], given["k"].shape[1]}  # of tokens, and of their steps
    for name, value in given.items():
        if name in known or not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] != batch:
            continue
        if lengths & set(value.shape[1:]):
            raise RuntimeError(
                f"{operator.__module__}.{operator.__name__} has an argument '{name}' with an entry for every token, "
                "which this version does not know how to cut. Install flash-linear-attention >=0.6,<0.7, or set "
                "refine.nsp.rollout=prefix."
            )
